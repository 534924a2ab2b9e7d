#!/bin/sh
# The test for virtme-ng.  $VMLINUZ: a kernel with 9p or virtiofs, its modules in ../lib/modules.
rm -f out.vng
cat >vng-test.sh <<END
set -e
modprobe dummy numdummies=1
grep -w test.word=42 /proc/cmdline
ls /sys/class/net/dummy0 >$PWD/out.vng
$1
if dmesg | grep -E 'WARNING:|BUG:'; then exit 99; fi
echo test: passed
END
timeout "${LIMIT:-300}" vng --force-9p --run "$VMLINUZ" --cpus 1 --memory 512M --verbose \
    --append test.word=42 --rwdir "$PWD" --exec "sh $PWD/vng-test.sh" </dev/null >vng.log 2>&1
echo "vng: status $?" >>vng.log  # 255 for all, on a host without udevd: so the log decides
cat vng.log
grep -q 'test: passed' vng.log && [ -s out.vng ]
