#!/bin/sh
# Makes the page: kernels compiled to WGSL, what was derived, the loader and the page itself, in a folder to be served.
#
#     build.sh EINFALL OUT        (the command einfall; `make web` has built the loader)
set -eu
einfall=$1
out=$2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out/kernels" "$out/einfall"
"$einfall" compile "$here/page.ein" --target wgsl --static E=32 --out "$out/kernels" >/dev/null
"$einfall" explain "$here/page.ein" --target webgpu --size H=12,M=16,N=16,E=32,T=16384,D=64 > "$out/derivation.txt"
cp "$here/index.html" "$here/page.js" "$here/page.ein" "$here/reference.json" "$out"
cp "$here"/../../web/dist/*.js "$out/einfall"
