# The commands of the project; CI runs the same ones. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Built once and kept outside the repository, so that a fresh clone starts warm. Everything else in there is cached by the
# hash of its inputs (e2e/cluster/lib.sh).
CACHE := $(or $(ASHLAR_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ashlar)
export ASHLAR_CACHE := $(CACHE)
# A build folder belongs to one checkout: cargo tells sources apart by their time, and would take another's for its own.
export CARGO_TARGET_DIR ?= $(CACHE)/target-$(shell (cat rust-toolchain.toml; pwd) | sha256sum | cut -c1-16)
# The name of the cluster that tests use; two checkouts may test at once under two names.
CLUSTER ?= test
CRD := inferenceservices.serving.ashlar.dev.yaml
REFERENCE := charts/docs/src/reference

.PHONY: help demo demo-down check gpu-check gpu-test gpu-bench gpu-peer-bench gpu-image unit clients schemathesis soak fuzz e2e docs-test book test deny generate pictures chart-test bench-peer bench-front-end gateway-bench scrape-bench operator-bench clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: ## a real cluster, the chart, a model, and an answer to a question; needs root
	e2e/demo/demo.sh

demo-down: ## ends the demo and leaves nothing behind
	e2e/cluster/down.sh demo

check: ## formatting and lints, in a minute or two
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --features ashlar-e2e/cluster -- -D warnings

gpu-check: ## compiles the GPU kernels for all architectures, lints what uses them, tests how they are planned; no GPU needed, nvcc is fetched
	. e2e/cuda.sh && cargo clippy --release -p ashlar -p ashlar-kernels --features ashlar/cuda --all-targets -- -D warnings
	KERNEL_ARCHS=none cargo test --release -p ashlar-kernels --features cuda --lib

gpu-test: ## the GPU kernels against their CPU references, whole models against the CPU; needs a GPU
	. e2e/cuda.sh && cargo test --release -p ashlar-kernels --features cuda --test cuda -- --test-threads 1
	. e2e/cuda.sh && cargo test --release -p ashlar --features cuda --lib model_runner::cuda
	. e2e/cuda.sh && ASHLAR_TEST_MODEL=$$(e2e/cluster/model.sh) cargo test --release -p ashlar --features cuda --test gpu_models -- --test-threads 1

gpu-bench: ## the GPU kernels' speed, as shares of the GPU's limits; needs a GPU
	. e2e/cuda.sh && cargo run --release -p ashlar-kernels --features cuda --example gpu_bench

gpu-peer-bench: ## what sums over tensor-parallel ranks cost; needs two or more GPUs
	. e2e/cuda.sh && cargo run --release -p ashlar-kernels --features cuda --example peer_bench

gpu-image: ## the runtime's image for NVIDIA GPUs: prints its name and archive (docker load --input ARCHIVE); no GPU needed
	. e2e/cuda.sh && e2e/cluster/images.sh runtime-cuda

unit: ## unit, property and snapshot tests: no cluster, no root
	ASHLAR_TEST_MODEL=$$(e2e/cluster/model.sh) ASHLAR_TEST_AWQ_MODEL=$$(e2e/cluster/awq.sh) cargo test --release --workspace

clients: ## OpenAI's and Anthropic's own Python clients against `ashlar serve` with the default model
	e2e/clients/tour.sh

schemathesis: ## requests made up from /openapi.json, valid and invalid: no 5xx, no undescribed answer
	e2e/clients/schemathesis.sh

soak: ## half an hour (MINUTES) of mixed load, disconnects and bad requests: nothing lost or stuck, memory flat
	e2e/clients/soak.sh

fuzz: ## each fuzz target of the runtime for MINUTES (10); TARGETS="gguf request" picks some
	runtime/fuzz/run.sh

e2e: ## only the end-to-end tests, on a cluster of their own or on that of KUBECONFIG
	CLUSTER=$(CLUSTER) e2e/test.sh e2e

test: ## everything, and one line that counts it; needs root
	CLUSTER=$(CLUSTER) e2e/test.sh all

deny: ## licences, sources and duplicates of the dependencies
	e2e/deny.sh

generate: ## the generated files: the resource's definition, the chart's copy of it, dashboards, the docs' reference
	cargo run --release --quiet --bin crdgen > crds/yaml/.new
	mv crds/yaml/.new crds/yaml/$(CRD)
	cp crds/yaml/$(CRD) charts/ashlar/files/$(CRD)
	PYTHONDONTWRITEBYTECODE=1 python3 charts/dashboards/build.py charts/ashlar/dashboards
	cargo run --release --quiet --bin crdgen reference > $(REFERENCE)/inferenceservice.md
	charts/docs/reference.py values charts/ashlar/values.yaml > $(REFERENCE)/values.md
	charts/docs/reference.py flags "$$(e2e/cluster/binaries.sh ashlar)" serve generate pull \
		"bench serve" "bench throughput" "bench concurrency" "bench perplexity" > $(REFERENCE)/ashlar.md
	charts/docs/reference.py flags "$$(e2e/cluster/binaries.sh ashlar-operator)" run gateway grant check crd simulate > $(REFERENCE)/ashlar-operator.md

pictures: ## the docs' pictures of the dashboards and their list of metrics, from a test run on a cluster; needs root
	rm -rf /tmp/ashlar-series
	ASHLAR_E2E_SERIES=/tmp/ashlar-series TEST=observe CLUSTER=$(CLUSTER) e2e/test.sh e2e
	charts/docs/pictures.py /tmp/ashlar-series/series.json charts/docs/src/img
	charts/docs/reference.py metrics Operator=/tmp/ashlar-series/Operator.metrics Gateway=/tmp/ashlar-series/Gateway.metrics \
		"Model pods=/tmp/ashlar-series/Model pods.metrics" > $(REFERENCE)/metrics.md

docs-test: ## follows the docs: every command and manifest of book and README, on a cluster of its own; needs root
	CLUSTER=$(CLUSTER) e2e/test.sh docs

book: ## renders the book into FOLDER (target/book) and checks every link in it
	e2e/docs/book.sh $(or $(FOLDER),target/book)

chart-test: ## renders the chart with several values and checks the result and the alerts; needs helm on PATH
	PROMTOOL=$$(e2e/cluster/prometheus.sh)/promtool charts/tests/render.sh

bench-peer: ## speed against llama.cpp's server, in turns on this machine; prints the ratios
	e2e/bench/peer.sh

bench-front-end: ## what HTTP costs: 1,000 streams against the engine's own rate, memory of 10,000 connections
	ulimit -n "$$(ulimit -Hn)" && cargo bench -p ashlar --bench front_end

gateway-bench: ## the gateway on one core, against HAProxy (Debian's, fetched when missing: needs root then) and no proxy
	command -v haproxy > /dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends haproxy; }
	ulimit -n "$$(ulimit -Hn)" && cargo bench -p ashlar-operator --bench gateway

scrape-bench: ## what asking 2,000 pods each second, and deciding on them, costs
	ulimit -n "$$(ulimit -Hn)" && cargo bench -p ashlar-operator --bench scrape

operator-bench: ## the operator at 1,000 services on a real API server; SERVICES=5000, REST=60, SCALED=1 change it; needs root
	e2e/bench/operator.sh --rollouts
	e2e/bench/operator.sh --faults --services 50 --foreign 0 --rest 30
	e2e/bench/operator.sh --services $(or $(SERVICES),1000) --rest $(or $(REST),600) $(if $(SCALED),--scaled)

clean: ## ends the test cluster and empties the cache
	e2e/cluster/down.sh $(CLUSTER)
	rm -rf "$(CACHE)"
