"""``pyvmm doctor``: report the abilities of this host's KVM, with a remedy for each failure."""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.kvm import probe
from pyvmm.kvm.handles import Kvm
from pyvmm.kvm.probe import Check, Host
from pyvmm.report import show
from pyvmm.startup.commands import Command, Option
from pyvmm.startup.options import parse_options
from pyvmm.x86 import trial

DESCRIPTION = """\
Say what this host's KVM can do, one line each: ok, note (pyvmm works without it, less well) or
FAIL with a remedy. At the end a guest of a few instructions is run, to see whether this KVM can do
what every Linux kernel does: return from an interrupt, take a breakpoint, take an interrupt.
"""
EPILOG = """\
exit status: 0 if a stock Linux kernel can run here, 1 if not (then `pyvmm lab -- CMD` can)
"""


COMMAND = Command(
    name="doctor",
    description=DESCRIPTION,
    epilog=EPILOG,
    options=(
        Option(name="--quiet", short="-q", help="print nothing: the exit status says it"),
        Option(name="--device", metavar="FILE", help="look at FILE instead of /dev/kvm"),
    ),
    meant=("--device",),
)


def doctor_main(argv: list[str], host: Host | None = None) -> int:
    """Print the report (``--quiet``: nothing); return 0 if a stock kernel can run here, else 1.

    ``host`` names the files to examine instead of /dev/kvm, /proc and /sys.
    """
    options = parse_options(COMMAND, argv)
    place = host or Host()
    if options.device is not None:
        place = Host(device=options.device, cpuinfo=place.cpuinfo, modules=place.modules)

    healthy = True
    for check in examine(place):
        healthy = healthy and (check.passed or not check.required)
        if not options.quiet:
            for line in _lines(check):
                show(line)
    if not options.quiet:
        show()
        show(_verdict(healthy))
    return 0 if healthy else 1


def examine(host: Host) -> Iterator[Check]:
    """Yield every check, in an order in which the first failure explains later ones."""
    kvm, check = probe.open_device(host)
    yield check
    if kvm is None:
        return
    with kvm:
        yield _back_end(host)
        yield from probe.capabilities(kvm)
        check = probe.create_vm(kvm)
        yield check
        if check.passed:
            yield from _trials(kvm, host)


def _back_end(host: Host) -> Check:
    names = probe.modules(host)
    detail = ", ".join(names) or "built into the kernel, or hidden by a container"
    return Check(name="KVM module", passed=True, required=False, detail=detail)


def _trials(kvm: Kvm, host: Host) -> Iterator[Check]:
    back_end = ", ".join(probe.modules(host)) or "this KVM"
    remedy = f"{back_end} lacks this; a host with kvm_amd or kvm_intel has it, "
    for result in trial.run_trials(kvm):
        yield Check(
            name=f"guest trial: {result.name}",
            passed=result.passed,
            detail="works" if result.passed else result.detail,
            remedy="" if result.passed else remedy + probe.LAB,
        )


def _lines(check: Check) -> Iterator[str]:
    if check.passed:
        mark = "ok"
    elif check.required:
        mark = "FAIL"
    else:
        mark = "note"
    missing = "" if check.passed or check.required else "missing: "
    yield f"{mark:<5} {check.name}: {missing}{check.detail}"
    if check.remedy:
        yield f"      remedy: {check.remedy}"


def _verdict(healthy: bool) -> str:
    if healthy:
        return "This host can run a stock Linux kernel."
    return (
        "This host cannot run a stock Linux kernel; what failed is above. "
        "`pyvmm lab -- CMD` runs CMD where one can."
    )
