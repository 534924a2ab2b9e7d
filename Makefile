# pyvmm: `make run` boots a guest, `make test` proves it.  `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
T ?= 60

VENV_PACKAGES := $(shell $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv)
KERNEL_PACKAGES := gcc binutils libc6-dev make flex bison bc libelf-dev lz4 tar xz-utils linux-source-6.1
IMAGE_PACKAGES := busybox-static e2fsprogs
LAB_PACKAGES := qemu-system-x86 busybox-static
AGENT_PACKAGES := musl-tools gcc binutils
TEST_PACKAGES := gcc libc6-dev linux-libc-dev e2fsprogs nbdkit qemu-utils qemu-system-common acpica-tools lz4 zstd \
	fdisk binutils xz-utils xfsprogs btrfs-progs squashfs-tools erofs-utils fakeroot dpkg-dev apt-utils kmod \
	chromium $(AGENT_PACKAGES)
# What guests of the tests run, from the host's packages: build/tools.img.
TOOL_PACKAGES := fio util-linux e2fsprogs gcc libc6-dev
# A Debian of its own for the tests: build/debian.img.
DEBIAN_PACKAGES := mmdebstrap debian-archive-keyring kmod e2fsprogs
BENCH_PACKAGES := gcc binutils libc6-dev linux-libc-dev qemu-system-x86 qemu-system-common
TOOLS := /usr/bin/fio /usr/bin/chrt /sbin/mke2fs /sbin/e2fsck /sbin/blkdiscard

# $(call need,PACKAGES): as root install the missing ones, else print the command that does.
define need
missing=; for p in $(1); do
  [ "$$(dpkg-query -W -f='$${db:Status-Status}' $$p 2>/dev/null || true)" = installed ] || missing="$$missing $$p"
done
if [ -n "$$missing" ]; then
  if ! command -v apt-get >/dev/null; then
    echo "pyvmm: please install what Debian calls:$$missing" >&2; exit 1
  elif [ "$$(id -u)" = 0 ]; then
    echo "pyvmm: installing$$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -o DPkg::Lock::Timeout=600 update -qq
    apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends $$missing >/dev/null
  else
    echo "pyvmm: packages are missing; install them with:" >&2
    echo "  sudo apt-get install --no-install-recommends$$missing" >&2; exit 1
  fi
fi
endef

# Sets $$host to what a command that needs a KVM for stock kernels is put behind.
define choose_host
host=
if ! $(BIN)/pyvmm doctor --quiet; then
  echo "pyvmm: this host's KVM cannot run a stock kernel ($(BIN)/pyvmm doctor says why): using the lab" >&2
  $(call need,$(LAB_PACKAGES))
  host="$(BIN)/pyvmm lab $(1) --"
fi
endef

.PHONY: help run run-packages shell test test-packages test-kernels lint check slow-tests needs unit unit-tests vm-test
.PHONY: power-cuts soak fuzz kernel stock debian agent
.PHONY: image venv dev bench doctor clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

run: run-packages venv kernel image ## boot build/root.img; ARGS='...' adds options of pyvmm run
	@$(call choose_host,--lock build/root.img)
	$$host $(BIN)/pyvmm run --kernel build/bzImage --disk build/root.img -v $(ARGS)

# All that is missing in one line, rather than a group at a time.  The doctor needs no .venv, and
# fails too if this Python is too old to run it.
run-packages:
	@lab=; $(PYTHON) -m pyvmm doctor --quiet 2>/dev/null || lab="$(LAB_PACKAGES)"
	$(call need,$(VENV_PACKAGES) $(KERNEL_PACKAGES) $(IMAGE_PACKAGES) $$lab)

test-packages:
	@$(call need,$(VENV_PACKAGES) $(KERNEL_PACKAGES) $(IMAGE_PACKAGES) $(LAB_PACKAGES) $(TEST_PACKAGES) $(TOOL_PACKAGES) $(DEBIAN_PACKAGES) $(BENCH_PACKAGES))

shell: override ARGS += --append pyvmm.shell
shell: run ## the same, with a shell on the guest's console (Ctrl-A x quits)

# Each stage runs, whatever became of those before it: the last lines say what failed.  A lab has
# one CPU, so the long ones run LANES at a time; the output of each is printed when it ends.
STAGES := test-kernels lint needs
LONG_STAGES := vm-tests-1 unit-tests vm-tests-2 vm-tests-3 power-cuts
LANES := 2

test: test-packages ## everything: lint, types, unit tests, bare guests, Linux guests
	@mkdir -p build
	# In the checkout, as the lab writes nothing else back.
	reports=$$(mktemp -d "$$PWD/build/.report.XXXXXX"); trap 'rm -rf "$$reports"' EXIT
	number=100
	run() {
	  local stage=$$1 files=$$reports/$$2 start=$$SECONDS result=passed
	  : >"$$files.report"
	  PYVMM_TEST_REPORT=$$files.report $(MAKE) $$stage || { result=FAILED; : >"$$reports/failed"; }
	  { printf '%-13s %s, %s s\n' $$stage $$result $$((SECONDS - start)); sed 's/^/  /' "$$files.report"; } >"$$files.summary"
	}
	for stage in $(STAGES); do run $$stage $$number; number=$$((number + 1)); done
	in_background() {
	  run $$1 $$2 >"$$reports/$$2.log" 2>&1 || true
	  flock "$$reports" cat "$$reports/$$2.log"
	}
	running=0
	for stage in $(LONG_STAGES); do
	  if [ $$running = $(LANES) ]; then wait -n || true; else running=$$((running + 1)); fi
	  echo "pyvmm: $$stage begins"
	  in_background $$stage $$number &
	  number=$$((number + 1))
	done
	wait
	printf '\n==== make test ====\n'; cat "$$reports"/*.summary
	[ ! -e "$$reports/failed" ]

lint: dev ## ruff, mypy --strict, import-linter
	@status=0
	$(BIN)/ruff check . || status=1
	$(BIN)/mypy || status=1
	$(BIN)/lint-imports || status=1
	exit $$status

# Neither kernel nor image: some seconds after an edit.
FAST := not slow and not bare and not kvm and not lab and not power_cut

check: dev ## lint and the fast unit tests, in under a minute: before every commit
	@$(call need,$(TEST_PACKAGES))
	# Side by side; what the linters say comes last.
	said=$$(mktemp); trap 'rm -f "$$said"' EXIT
	$(MAKE) lint >"$$said" 2>&1 & linters=$$!
	status=0
	$(BIN)/python -m pytest -q -m "$(FAST)" $(PYTEST_ARGS) || status=1
	wait $$linters || status=1
	cat "$$said"
	exit $$status

slow-tests: dev kernel image build/tools.img ## measure which tests are slow, on a quiet machine: writes tests/slow.txt
	@PYVMM_MEASURE_TESTS=1 $(BIN)/python -m pytest -q -m "not bare and not kvm and not lab and not power_cut"

needs: dev kernel image build/tools.img build/roots-gpt.img build/twice/bzImage stock debian
	@$(call need,$(TEST_PACKAGES) $(LAB_PACKAGES) $(BENCH_PACKAGES))
	# What it downloads the first time is not for a test's output; if it fails, tests will tell.
	$(BIN)/pyvmm lab -- true || true

unit: dev kernel image build/tools.img ## tests that need no KVM, and bare guests if there is a /dev/kvm
	@$(call need,$(TEST_PACKAGES) $(LAB_PACKAGES) $(BENCH_PACKAGES))
	$(BIN)/pyvmm lab -- true || true
	$(unit_tests)

define unit_tests
select="not kvm and not power_cut"
if ! [ -r /dev/kvm -a -w /dev/kvm ]; then
  echo "pyvmm: no usable /dev/kvm here: the bare guests run in the lab"; select="not kvm and not power_cut and not bare"
fi
$(BIN)/python -m pytest -q -m "$$select" $(PYTEST_ARGS)
endef

# $(call vm_tests,OPTIONS)
define vm_tests
$(call choose_host,--timeout 3600 --memory 3G)
select=kvm rooms="tests/vm tests/docs tests/examples"
[ -r /dev/kvm -a -w /dev/kvm ] || { select="kvm or bare"; rooms="$$rooms tests/api tests/board"; }
$$host $(BIN)/python -m pytest -q -m "$$select" $(1) $$rooms $(PYTEST_ARGS)
endef

vm-test: needs ## Linux guests; in the lab where this host's KVM cannot
	@status=0
	( $(call vm_tests,) ) || status=1
	$(BIN)/python -m pytest -q -m power_cut tests/vm $(PYTEST_ARGS) || status=1
	exit $$status

# The parts of `make test` that take long; each takes for granted what `needs` makes.
unit-tests:
	@$(unit_tests)

vm-tests-%:
	@$(call vm_tests,--part $*/$(words $(filter vm-tests-%,$(LONG_STAGES))))

power-cuts:
	@$(BIN)/python -m pytest -q -m power_cut tests/vm $(PYTEST_ARGS)

soak: needs ## an hour of rings, 10,000 power cuts, a minute of load on four vCPUs, 50 snapshots of Linux, 100 clones
	@$(call choose_host,--memory 4G)
	PYVMM_SOAK_S=$${PYVMM_SOAK_S:-3600} $(BIN)/python -m pytest -q -s --timeout 0 tests/virtio/ring/test_ring_model.py
	PYVMM_STRESS_S=60 $$host $(BIN)/python -m pytest -q --timeout 1200 tests/vm/test_smp.py
	PYVMM_SNAPSHOTS=50 PYVMM_CLONES=100 $$host $(BIN)/python -m pytest -q -s --timeout 0 \
	  tests/vm/test_linux_snapshots.py tests/vm/test_linux_clones.py
	PYVMM_POWER_CUTS=10000 $(BIN)/python -m pytest -q -m power_cut --timeout 7200 tests/vm

fuzz: dev ## fuzz what reads untrusted bytes for T seconds (60) in all; ARGS='rings text' picks targets
	@$(BIN)/python -m fuzz --seconds $(T) $(ARGS)

kernel: build/bzImage build/vmlinux ## build/bzImage and build/vmlinux (minutes the first time, then cached)

BUILD_KERNEL := kernels/build.py $(wildcard pyvmm/linux/build/*.py) pyvmm/linux/build/pyvmm.config

build/bzImage build/vmlinux &: $(BUILD_KERNEL)
	@$(call need,$(KERNEL_PACKAGES))
	$(PYTHON) kernels/build.py --out build
	touch build/bzImage build/vmlinux

# Told of its disks twice, by ACPI and by the command line: for the tests.
build/twice/bzImage: pyvmm/linux/build/twice.config $(BUILD_KERNEL)
	@$(call need,$(KERNEL_PACKAGES))
	$(PYTHON) kernels/build.py --fragment pyvmm/linux/build/twice.config --out build/twice
	touch $@

# Both of them, in one tree where neither is cached.
test-kernels:
	@if $(MAKE) -q build/bzImage build/twice/bzImage; then exit; fi
	$(call need,$(KERNEL_PACKAGES))
	$(PYTHON) kernels/build.py --out build --variant pyvmm/linux/build/twice.config build/twice
	touch build/bzImage build/vmlinux build/twice/bzImage

# Asked every time, from the cache unless apt knows a newer one; the tests read what it says.
stock: venv ## Debian's own kernels, for the tests (cached; build/debian*.txt says where they are)
	@mkdir -p build
	$(BIN)/pyvmm kernel fetch debian >build/debian.txt
	$(BIN)/pyvmm kernel fetch debian --backports >build/debian-backports.txt

# Of the kernel that `stock` fetches, so asked every time; from the cache unless apt knows a newer one.
debian: venv stock ## build/debian.img: Debian with systemd, for the tests (cached)
	@$(call need,$(DEBIAN_PACKAGES))
	$(BIN)/python guest/build_debian.py --out build/debian.img

BUILD_IMAGE := guest/build_image.py $(wildcard pyvmm/linux/images/*.py pyvmm/linux/images/init pyvmm/linux/images/pyvmm-* pyvmm/agent/pyvmm-agent)

image: build/root.img build/test.img ## build/root.img: busybox on ext4, 64 MiB (test.img: for the tests)

build/root.img build/test.img &: $(BUILD_IMAGE)
	@$(call need,$(IMAGE_PACKAGES))
	mkdir -p build
	$(PYTHON) guest/build_image.py --out build/test.img --initrd build/initramfs.cpio.gz
	cp --sparse=always build/test.img build/root.img

agent: ## pyvmm/agent/pyvmm-agent, the program in guests; commit what changes
	@$(call need,$(AGENT_PACKAGES))
	$(PYTHON) guest/agent/build.py

build/pyvmm-scattered: guest/tools/pyvmm-scattered.c
	@$(call need,gcc libc6-dev)
	mkdir -p build
	gcc -O2 -Wall -Wextra -Werror -static -s -o $@ $<

build/tools.img: Makefile $(BUILD_IMAGE) build/pyvmm-scattered
	@$(call need,$(IMAGE_PACKAGES) $(TOOL_PACKAGES))
	mkdir -p build
	$(PYTHON) guest/build_image.py --out build/tools.img --size 192M $(addprefix --with-program ,$(TOOLS)) \
	  --add build/pyvmm-scattered:/bin/pyvmm-scattered

# Roots of every kind on partitions of every kind: for the tests.
build/roots-gpt.img build/roots-dos.img &: tests/support/roots.py pyvmm/linux/initramfs.py pyvmm/linux/stock_init.sh
	@$(call need,$(VENV_PACKAGES) $(TEST_PACKAGES))
	$(MAKE) dev
	$(BIN)/python -m tests.support.roots

venv: .venv/.installed ## .venv/bin/pyvmm

# --upgrade-deps: the command that an older pip makes for pyvmm imports re, 1.5 ms a start.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pyvmm: $(PYTHON) is $$($(PYTHON) -V); pyvmm needs Python 3.11 or newer" >&2; exit 1; }
	@$(call need,$(VENV_PACKAGES))
	$(PYTHON) -m venv --upgrade-deps .venv
	@$(BIN)/pip -qq uninstall -y setuptools  # nothing needs it here, and its .pth costs every start 1 ms

.venv/.installed: .venv/bin/python pyproject.toml
	@$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

dev: .venv/.dev-installed ## the same, with what the tests and linters need

.venv/.dev-installed: .venv/.installed pyproject.toml
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

bench: dev kernel image build/tools.img build/twice/bzImage ## every figure beside its peers; ARGS='--quick', '--only device'
	@$(call need,$(BENCH_PACKAGES) $(LAB_PACKAGES))
	$(BIN)/python -m bench.run $(ARGS)

doctor: venv ## what this host's KVM can do
	@$(BIN)/pyvmm doctor || true

clean: ## remove build/ and .venv/ (the caches in ~/.cache/pyvmm stay)
	rm -rf build .venv
