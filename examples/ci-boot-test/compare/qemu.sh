#!/bin/sh
# The test for QEMU alone.  $VMLINUZ: the kernel.  $MODULE: dummy.ko.  The file comes over ttyS1.
set -e
rm -rf initramfs out.qemu
mkdir -p initramfs/bin initramfs/proc initramfs/sys initramfs/dev
cp "$(command -v busybox)" initramfs/bin/busybox
cp "$MODULE" initramfs/dummy.ko
for name in sh insmod mount ls grep cat dmesg reboot sleep; do
    ln -s busybox initramfs/bin/$name
done
cat >initramfs/test.sh <<END
set -e
insmod /dummy.ko
grep -w test.word=42 /proc/cmdline
ls /sys/class/net/dummy0 >/dev/ttyS1
$1
END
cat >initramfs/init <<'END'
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
sh /test.sh; status=$?
if dmesg | grep -E 'WARNING:|BUG:'; then status=99; fi
echo "test: status $status"
sleep 1
reboot -f
END
chmod 755 initramfs/init
(cd initramfs && find . | busybox cpio -o -H newc -R 0:0 2>/dev/null | gzip -1) >initramfs.gz
status=0
timeout "${LIMIT:-120}" qemu-system-x86_64 -accel kvm -cpu host -m 512M -nodefaults -display none \
    -no-reboot -kernel "$VMLINUZ" -initrd initramfs.gz -serial stdio -serial file:out.qemu \
    -append 'console=ttyS0 panic=-1 test.word=42' </dev/null >qemu.log || status=$?
cat qemu.log
[ $status = 0 ] || exit 124
said=$(sed -n 's/^test: status \([0-9]*\).*/\1/p' qemu.log)
exit "${said:-120}"
