#!/bin/sh
# The test for pyvmm.  $KERNEL: a directory of `pyvmm kernel fetch`.  $1: one more line for the guest.
exec pyvmm test --kernel "$KERNEL" --disk root.img,snapshot --memory 512M --append test.word=42 \
    --boot-timeout 300 --timeout 60 --put "$MODULE:/tmp/dummy.ko" --get /tmp/out:out.pyvmm -- sh -ec '
    insmod /tmp/dummy.ko
    grep -w test.word=42 /proc/cmdline
    ls /sys/class/net/dummy0 >/tmp/out
    '"$1"
