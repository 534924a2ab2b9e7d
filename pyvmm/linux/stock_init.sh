#!/bin/busybox sh
# PID 1 of the initramfs that pyvmm makes for a distribution's kernel: loads the modules that the
# kernel needs to see its disk, mounts it and hands over to the disk's own init.
#
# From the kernel command line it takes root= (a device, or UUID=, LABEL=, PARTUUID=; /dev/vda if
# there is none), rootfstype=, rootflags=, rootdelay=, ro, rw and init=, each as the kernel itself
# takes it without an initramfs.
#
# initramfs.py makes a link in /bin for each applet used here.

export PATH=/bin
WAIT_S=10  # for a disk that does not show up

say() {
  echo "pyvmm-initramfs: $*"
}

# The kernel panics when PID 1 ends, and names no reason: it stands in the line before.
fail() {
  say "cannot mount the root: $*"
  exit 1
}

# Sets ROOT, TYPE, FLAGS, MODE and INIT from the command line $1; the last of a word counts.
parse_cmdline() {
  local word quoted
  ROOT=/dev/vda TYPE='''' FLAGS='' MODE=ro INIT='' quoted=''
  set -f
  for word in $1; do
    # What stands in double quotes is somebody's text.
    case $word in
      *\"*\"*) continue ;;
      *\"*) [ -n "$quoted" ] && quoted='' || quoted=yes; continue ;;
    esac
    [ -z "$quoted" ] || continue
    case $word in
      root=*) ROOT=${word#root=} ;;
      rootfstype=*) TYPE=${word#rootfstype=} ;;
      rootflags=*) FLAGS=${word#rootflags=} ;;
      rootdelay=*[!0-9]* | rootdelay=) ;;
      rootdelay=*) WAIT_S=${word#rootdelay=} ;;
      ro | rw) MODE=$word ;;
      init=*) INIT=${word#init=} ;;
      --) break ;;
    esac
  done
  set +f
}

# Prints the device that $1 stands for, once it is there.
find_device() {
  case $1 in
    *=*) findfs "$1" 2>/dev/null ;;
    *) [ -b "$1" ] && echo "$1" ;;
  esac
}

main() {
  local cmdline tries device program missing=''
  mount -t devtmpfs devtmpfs /dev
  mount -t proc proc /proc
  mount -t sysfs sysfs /sys
  for module in /modules/*; do
    # A CPU may lack what one of them wants; the disk will tell whether it mattered.
    insmod "$module" 2>/dev/null || missing="$missing ${module##*/}"
  done
  # Only now: the console may be one of theirs, hvc0.  Without any, exec would end this shell.
  (: <>/dev/console) 2>/dev/null && exec </dev/console >/dev/console 2>&1
  for module in $missing; do
    say "cannot load $module"
  done
  read -r cmdline </proc/cmdline
  parse_cmdline "$cmdline"
  tries=$((WAIT_S * 20))
  until device=$(find_device "$ROOT"); do
    [ $tries -gt 0 ] || fail "no $ROOT after $WAIT_S s; there are: $(ls /sys/block | tr '\n' ' ')"
    tries=$((tries - 1))
    sleep 0.05
  done
  # Read-write and read-only go first, so that rootflags= has the last word, as in the kernel.
  if [ -n "$TYPE" ]; then
    mount -t "$TYPE" -o "$MODE${FLAGS:+,$FLAGS}" "$device" /root
  else
    mount -o "$MODE${FLAGS:+,$FLAGS}" "$device" /root
  fi || fail "$device is none of: $(grep -v nodev /proc/filesystems | tr -s '\t\n' '  ')"
  for program in ${INIT:-/sbin/init /etc/init /bin/init /bin/sh}; do
    # A link may point to somewhere that only exists once the root is /.
    [ -x "/root$program" ] || [ -L "/root$program" ] || continue
    # The init finds what it would without us: the kernel would have mounted /dev, nothing else.
    umount /sys
    umount /proc
    mount --move /dev /root/dev || umount -l /dev
    exec switch_root /root "$program" "$@"
  done
  fail "$device has no ${INIT:-/sbin/init}"
}

# Not when a test reads the functions above.
[ $$ -ne 1 ] || main "$@"
