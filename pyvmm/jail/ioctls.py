"""The numbers of the ioctl requests that filters name.

``kvm`` is above this room, so the numbers stand here again; ``tests/jail/test_table.py`` compares
them with the binding's.
"""

from __future__ import annotations

import termios
from types import MappingProxyType

KVM = MappingProxyType({
    "KVM_GET_API_VERSION": 0x0000ae00,
    "KVM_CREATE_VM": 0x0000ae01,
    "KVM_GET_MSR_INDEX_LIST": 0xc004ae02,
    "KVM_CHECK_EXTENSION": 0x0000ae03,
    "KVM_GET_VCPU_MMAP_SIZE": 0x0000ae04,
    "KVM_GET_SUPPORTED_CPUID": 0xc008ae05,
    "KVM_CREATE_VCPU": 0x0000ae41,
    "KVM_SET_USER_MEMORY_REGION": 0x4020ae46,
    "KVM_SET_TSS_ADDR": 0x0000ae47,
    "KVM_SET_IDENTITY_MAP_ADDR": 0x4008ae48,
    "KVM_CREATE_IRQCHIP": 0x0000ae60,
    "KVM_IRQ_LINE": 0x4008ae61,
    "KVM_GET_IRQCHIP": 0xc208ae62,
    "KVM_SET_IRQCHIP": 0x8208ae63,
    "KVM_REGISTER_COALESCED_MMIO": 0x4010ae67,
    "KVM_UNREGISTER_COALESCED_MMIO": 0x4010ae68,
    "KVM_IRQFD": 0x4020ae76,
    "KVM_CREATE_PIT2": 0x4040ae77,
    "KVM_IOEVENTFD": 0x4040ae79,
    "KVM_SET_CLOCK": 0x4030ae7b,
    "KVM_GET_CLOCK": 0x8030ae7c,
    "KVM_RUN": 0x0000ae80,
    "KVM_GET_REGS": 0x8090ae81,
    "KVM_SET_REGS": 0x4090ae82,
    "KVM_GET_SREGS": 0x8138ae83,
    "KVM_SET_SREGS": 0x4138ae84,
    "KVM_TRANSLATE": 0xc018ae85,
    "KVM_GET_MSRS": 0xc008ae88,
    "KVM_SET_MSRS": 0x4008ae89,
    "KVM_GET_FPU": 0x81a0ae8c,
    "KVM_SET_FPU": 0x41a0ae8d,
    "KVM_GET_LAPIC": 0x8400ae8e,
    "KVM_SET_LAPIC": 0x4400ae8f,
    "KVM_SET_CPUID2": 0x4008ae90,
    "KVM_GET_MP_STATE": 0x8004ae98,
    "KVM_SET_MP_STATE": 0x4004ae99,
    "KVM_GET_PIT2": 0x8070ae9f,
    "KVM_GET_VCPU_EVENTS": 0x8040ae9f,
    "KVM_SET_PIT2": 0x4070aea0,
    "KVM_SET_VCPU_EVENTS": 0x4040aea0,
    "KVM_GET_DEBUGREGS": 0x8080aea1,
    "KVM_SET_DEBUGREGS": 0x4080aea2,
    "KVM_SET_TSC_KHZ": 0x0000aea2,
    "KVM_GET_TSC_KHZ": 0x0000aea3,
    "KVM_GET_XSAVE": 0x9000aea4,
    "KVM_SET_XSAVE": 0x5000aea5,
    "KVM_GET_XCRS": 0x8188aea6,
    "KVM_SET_XCRS": 0x4188aea7,
    "KVM_KVMCLOCK_CTRL": 0x0000aead,
    "KVM_GET_SREGS2": 0x8140aecc,
    "KVM_SET_SREGS2": 0x4140aecd,
    "KVM_GET_XSAVE2": 0x9000aecf,
    "KVM_SET_DEVICE_ATTR": 0x4018aee1,
    "KVM_GET_DEVICE_ATTR": 0x4018aee2,
})
"""<linux/kvm.h>."""

_OTHERS = {
    name: int(getattr(termios, name))
    for name in (
        "TCGETS", "TCSETS", "TCFLSH", "TIOCGPGRP", "TIOCGWINSZ", "TIOCOUTQ", "FIONBIO", "FIOCLEX",
    )
}
REQUESTS = MappingProxyType({**KVM, **_OTHERS, "PAGEMAP_SCAN": 0xC060_6610})
"""These, those of terminals and descriptors, and that of <linux/fs.h> from Linux 6.7 on."""
