#!/bin/busybox sh
# PID 1 of the lab: mounts the host's file system, runs CMD in it and reports how it ended.
#
# It talks to pyvmm over virtio-serial ports, in the order of pyvmm/lab/qemu.py:
#   vport0p1  CMD's standard input     vport0p2  its output     vport0p3  its errors
#   vport0p4  control, lines of text.  To us: hello; signal NAME; beat; hangup 1|2; winsize ROWS COLUMNS.
#             From us: ready (CMD starts); fail TEXT (the lab is broken); exit STATUS.
#   hvc0      a terminal, instead of the first two ports, when pyvmm has one.
# CMD's output ends with $END, so that pyvmm knows it has all of it.
#
# initramfs.py makes a link in /bin for each applet used here.

export PATH=/bin
P=trans=virtio,version=9p2000.L,msize=512000,access=any
N=/new

fail() {
  echo "lab: $*" >/dev/console
  [ -n "$CONTROL" ] && echo "fail $*" >&3
  sleep 5  # pyvmm stops the machine before that
  poweroff -f
}

mount_writable() {  # TAG DIRECTORY
  mkdir -p "$N$2" && mount -t 9p -o "rw,cache=mmap,$P" "$1" "$N$2" || fail "cannot mount $2"
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do
  insmod "$module" || fail "cannot load $module"
done
# Linux refines its idea of the emulated TSC's rate after kvm has taken it over.  A difference over
# the default tolerance (250 ppm; 620 were seen) makes KVM refuse the vCPU's rate, and the clock of
# every guest in this lab stands still.
echo 10000 >/sys/module/kvm/parameters/tsc_tolerance_ppm || fail "kvm has no tsc_tolerance_ppm"
. /lab/run

# The control port is the last: once it is connected to pyvmm, so are the others.  A port that is
# not connected yet reads as ended.
until [ -c /dev/vport0p4 ]; do sleep 0.01; done
exec 3<>/dev/vport0p4
until read -r hello <&3; do sleep 0.01; done
CONTROL=1

mount -t 9p -o "ro,cache=loose,$P" host /lower || fail "cannot mount the host's file system"
[ -c /dev/kvm ] || fail "kvm_amd gave no /dev/kvm"
mount -t tmpfs -o size=80% upper /upper && mkdir /upper/data /upper/work &&
  mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay $N ||
  fail "cannot put an overlay on the host's file system"
mkdir -p $N/dev $N/proc $N/sys $N/run
for directory in dev proc sys; do mount --bind /$directory $N/$directory; done
mkdir -p $N/dev/pts $N/dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts $N/dev/pts
mount -t tmpfs shm $N/dev/shm
mount -t tmpfs run $N/run
ln -sfn /proc/self/fd $N/dev/fd
ln -sfn /proc/self/fd/0 $N/dev/stdin
ln -sfn /proc/self/fd/1 $N/dev/stdout
ln -sfn /proc/self/fd/2 $N/dev/stderr
chmod 666 $N/dev/kvm
hostname lab
ifconfig lo 127.0.0.1 up
mount_all_writable
mkdir $N/run/lab
cp /bin/busybox /lab/command $N/run/lab

# CMD gets pipes, not ports: a port can be opened only once, so /dev/stdout would be busy.
IN=/lab/in OUT=/lab/out ERR=/lab/err SETSID=setsid
exec 5>/dev/vport0p3
if [ $TERMINAL = 0 ]; then
  exec 4>/dev/vport0p2
else
  exec 4>/dev/hvc0
  stty rows $ROWS cols $COLUMNS </dev/hvc0
  IN=/dev/hvc0 OUT=/dev/hvc0 SETSID="setsid -c"
  [ $STDERR_ON_TERMINAL = 1 ] && ERR=/dev/hvc0
fi
mkfifo /lab/in /lab/out /lab/err
[ $IN = /lab/in ] && { cat </dev/vport0p1 >$IN 3<&- 4>&- 5>&- & }
[ $OUT = /lab/out ] && { cat <$OUT >&4 3<&- 5>&- & } && OUT_PID=$!
[ $ERR = /lab/err ] && { cat <$ERR >&5 3<&- 4>&- & } && ERR_PID=$!

{
  while read -r verb first second; do
    case $verb in
      signal) read -r pid <$N/run/lab/pid && kill -s "$first" "-$pid" ;;
      beat) ;;  # its interrupt is all that matters
      hangup) [ "$first" = 1 ] && kill $OUT_PID || kill $ERR_PID ;;
      winsize) stty rows "$first" cols "$second" </dev/hvc0 ;;
    esac
  done
  poweroff -f  # pyvmm is gone
} <&3 4>&- 5>&- 2>/dev/null &

# In the foreground, because a shell starts background commands with SIGINT ignored; in a subshell,
# because this one would write "Killed" to CMD's errors.
echo ready >&3
(exec $SETSID chroot $N /run/lab/busybox sh /run/lab/command <$IN >$OUT 2>$ERR 3<&- 4>&- 5>&-)
STATUS=$?

# What CMD left running may still write, but not for ever.
{
  sleep 2
  read -r self _ </proc/self/stat
  for process in /proc/[0-9]*; do
    process=${process#/proc/}
    case " $$ $self $OUT_PID $ERR_PID " in *" $process "*) ;; *) kill -9 "$process" ;; esac
  done
} >/dev/null 2>&1 3<&- 4>&- 5>&- &
# The end of a session hangs its terminal up, and our descriptor with it.
[ $TERMINAL = 0 ] || exec 4>/dev/hvc0
[ -z "$OUT_PID$ERR_PID" ] || wait $OUT_PID $ERR_PID
printf '\0%s' "$END" >&4
printf '\0%s' "$END" >&5
sync
echo "exit $STATUS" >&3
sleep 60  # pyvmm stops the machine before that
poweroff -f
