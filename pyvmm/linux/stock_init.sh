#!/bin/busybox sh
# PID 1 of the initramfs that pyvmm makes for a distribution's kernel: loads the modules that the
# kernel needs to see its disk, mounts it and hands over to the disk's own init.
#
# From the kernel command line it takes root= (/dev/vda if there is none), rootfstype=, rootflags=,
# rootdelay=, rootwait, ro, rw and init=, each as the kernel itself takes it without an initramfs.
# root= is a device, PARTUUID= (with /PARTNROFF= or without), PARTLABEL=, or a device's number, as
# in the kernel (init/do_mounts.c), or else UUID= or LABEL= of a file system.
#
# initramfs.py makes a link in /bin for each applet used here.

export PATH=/bin
SYS=/sys DEV=/dev
BLANKS=" 	"
WAIT_S=10  # for a disk that does not show up

say() {
  echo "pyvmm-initramfs: $*"
}

# The kernel panics when PID 1 ends, and names no reason: it stands in the line before.
fail() {
  say "cannot mount the root: $*"
  exit 1
}

# Sets ROOT, TYPE, FLAGS, MODE, INIT, FOREVER and WAIT_S from the command line $1; the last of a word
# counts.  Blanks part words, but not between double quotes, which are taken away.
parse_cmdline() {
  local rest=$1 piece word='' quoted=''
  ROOT=/dev/vda TYPE='' FLAGS='' MODE=ro INIT='' FOREVER=''
  while [ -n "$rest" ]; do
    piece=${rest%%[\"$BLANKS]*}
    word=$word$piece rest=${rest#"$piece"}
    case $quoted$rest in
      on\"*) quoted='' rest=${rest#?} && continue ;;
      \"*) quoted=on rest=${rest#?} && continue ;;
      on?*) word="$word " rest=${rest#?} && continue ;;
    esac
    rest=${rest#?}
    [ "$word" != -- ] || return 0
    take_word "$word"
    word=''
  done
  take_word "$word"
}

take_word() {
  case $1 in
    root=*) ROOT=${1#root=} ;;
    rootfstype=*) TYPE=${1#rootfstype=} ;;
    rootflags=*) FLAGS=${1#rootflags=} ;;
    rootdelay=*[!0-9]* | rootdelay= | rootwait=*[!0-9]* | rootwait= | root*=0?*) ;;
    rootdelay=* | rootwait=*) WAIT_S=${1#root*=} ;;
    rootwait) FOREVER=1 ;;
    ro | rw) MODE=$1 ;;
    init=*) INIT=${1#init=} ;;
  esac
}

# Prints the device that $1 stands for, once it is there.
find_device() {
  case $1 in
    PARTUUID=* | PARTLABEL=*) find_partition "$1" ;;
    *=*) findfs "$1" 2>/dev/null ;;
    /*) [ -b "$1" ] && echo "$1" ;;
    *:*) find_number "$1" ;;
    *[!0-9a-fA-F]* | '' | ?????????*) return 1 ;;
    # The kernel's new_decode_dev: twelve bits of major number between those of the minor.
    *) find_number $(((0x$1 >> 8) & 0xfff)):$((0x$1 & 0xff | (0x$1 >> 12) & 0xfff00)) ;;
  esac
}

# Prints the device with the number $1, MAJOR:MINOR.
find_number() {
  local path number
  for path in "$SYS"/class/block/*; do
    read -r number 2>/dev/null <"$path/dev" || continue
    [ "$number" != "$1" ] || { echo "/dev/${path##*/}"; return 0; }
  done
  return 1
}

# Prints the device of the partition $1, PARTUUID=... or PARTLABEL=...
find_partition() {
  local wanted=${1#*=} offset=0 name disk number uuid label found
  case $1 in
    PARTUUID=*/PARTNROFF=*) offset=${wanted##*=} wanted=${wanted%/PARTNROFF=*} ;;
  esac
  case ${offset#-} in '' | *[!0-9]* | 0?*) return 1 ;; esac
  [ -n "$wanted" ] || return 1
  case $1 in PARTUUID=*) wanted=$(echo "$wanted" | tr A-F a-f) ;; esac
  list_partitions | while read -r name disk number uuid label; do
    case $1 in PARTUUID=*) found=$uuid ;; *) found=$label ;; esac
    [ "$found" = "$wanted" ] || continue
    [ "$offset" = 0 ] || name=$(partition_name "$disk" $((number + offset)))
    [ -z "$name" ] || echo "/dev/$name"
    break
  done | grep .
}

# Prints the name of partition $2 of the disk $1; partition 0 is the disk.
partition_name() {
  local path number
  [ "$2" != 0 ] || echo "$1"
  for path in "$SYS/block/$1/$1"*; do
    read -r number 2>/dev/null <"$path/partition" || continue
    [ "$number" != "$2" ] || echo "${path##*/}"
  done
}

# Prints NAME DISK NUMBER PARTUUID PARTLABEL for each partition; "-" for a PARTUUID it does not have.
list_partitions() {
  local path disk number uuid label line table='' table_disk=''
  for path in "$SYS"/block/*/*/partition; do
    path=${path%/partition} uuid='' label=''
    read -r number 2>/dev/null <"$path/partition" || continue
    disk=${path#"$SYS/block/"} disk=${disk%/*}
    while read -r line; do
      case $line in
        PARTUUID=*) uuid=${line#*=} ;;  # Linux 6.9 and later
        PARTNAME=*) label=${line#*=} ;;
      esac
    done <"$path/uevent"
    if [ -z "$uuid" ]; then
      [ "$disk" = "$table_disk" ] || table=$(read_table "$disk") table_disk=$disk
      uuid=$(read_partuuid "$disk" "$number" $table)
    fi
    echo "${path##*/} $disk $number $uuid $label"
  done
}

# Prints where the entries of the GPT of the disk $1 begin and how long each is; for an MBR, "dos" and
# the disk's identifier.
read_table() {
  local device=$DEV/$1 block sectors header entries
  read -r block <"$SYS/block/$1/queue/logical_block_size"
  read -r sectors <"$SYS/block/$1/size"
  entries=$(read_hex "$device" 446 64)
  while [ -n "$entries" ]; do
    # A GPT has a protective entry, of type 0xee, in the MBR (UEFI 2.10, 5.2.3); its header lies
    # behind that, a second one at the end of the disk (5.3.2).
    case $entries in ????????ee*)
      for header in $block $((sectors * 512 - block)); do
        [ "$(read_hex "$device" "$header" 8)" = 4546492050415254 ] || continue  # "EFI PART"
        echo $(($(read_number "$device" $((header + 72)) 8) * block)) \
          $(($(read_number "$device" $((header + 84)) 4)))
        return
      done
    esac
    entries=${entries#????????????????????????????????}
  done
  echo dos "$(reversed "$(read_hex "$device" 440 4)")"
}

# Prints what PARTUUID= is for partition $2 of the disk $1, whose table is $3 and $4 (read_table).
read_partuuid() {
  if [ "$3" = dos ]; then
    [ -n "$4" ] && printf '%s-%02x' "$4" "$2" || echo -
  else
    mixed_endian "$(read_hex "$DEV/$1" $(($3 + ($2 - 1) * $4 + 16)) 16)"
  fi
}

# Prints $3 bytes at offset $2 of the device $1 as hexadecimal digits.
read_hex() {
  dd if="$1" bs=1 skip="$2" count="$3" 2>/dev/null | hexdump -v -e '/1 "%02x"'
}

# Prints the little-endian number of $3 bytes at offset $2 of the device $1.
read_number() {
  echo "0x$(reversed "$(read_hex "$1" "$2" "$3")")"
}

# Prints the bytes $1, in hexadecimal digits, last one first.
reversed() {
  local rest=$1 done=''
  while [ -n "$rest" ]; do
    done=${rest%"${rest#??}"}$done rest=${rest#??}
  done
  echo "$done"
}

# Prints the 16 bytes $1 as a GUID is written: the first three fields are little-endian.
mixed_endian() {
  local first second third fourth fifth
  fifth=${1#????????????????????}
  fourth=${1#????????????????} fourth=${fourth%"$fifth"}
  third=${1#????????????} third=${third%"$fourth$fifth"}
  second=${1#????????} second=${second%"$third$fourth$fifth"}
  first=${1%"$second$third$fourth$fifth"}
  [ -n "$first" ] || { echo -; return; }
  echo "$(reversed "$first")-$(reversed "$second")-$(reversed "$third")-$fourth-$fifth"
}

# Prints the names of the disks and partitions, and says before what the partitions are called.
list_devices() {
  local name disk number uuid label
  list_partitions | while read -r name disk number uuid label; do
    say "$name is PARTUUID=$uuid${label:+ PARTLABEL=$label}" >&2
  done
  echo $(ls "$SYS/class/block")
}

# Prints the type of the file system on the device $1, if its driver may have to be loaded.
file_system() {
  case $(read_hex "$1" 0 4) in
    58465342) echo xfs && return ;;
    68737173) echo squashfs && return ;;
  esac
  case $(read_hex "$1" 1024 4) in
    e2e1f5e0) echo erofs && return ;;
    1020f5f2) echo f2fs && return ;;
  esac
  [ "$(read_hex "$1" 32769 5)" = 4344303031 ] && echo iso9660 && return
  [ "$(read_hex "$1" 65600 8)" = 5f42485266535f4d ] && echo btrfs
}

# Mounts the device $1 on /root: as one of the types of rootfstype=, or as what is found there.
mount_root() {
  local type module
  for type in $(echo "${TYPE:-$(file_system "$1")}" | tr , ' '); do
    for module in /file-systems/"$type"/*; do
      [ -e "$module" ] || continue
      gunzip -c "$module" >/module.ko && insmod /module.ko 2>/dev/null
    done
    mount_as -t "$type" "$1" && return
  done
  [ -z "$TYPE" ] && mount_as "$1"
}

# Read-write and read-only go first, so that rootflags= has the last word, as in the kernel.
mount_as() {
  mount -o "$MODE${FLAGS:+,$FLAGS}" "$@" /root
}

# Sets UPTIME_S to the whole seconds since the kernel began.
read_uptime() {
  read -r UPTIME_S _ </proc/uptime
  UPTIME_S=${UPTIME_S%.*}
}

main() {
  local cmdline until_s said='' device program missing=''
  mount -t devtmpfs devtmpfs /dev
  mount -t proc proc /proc
  mount -t sysfs sysfs /sys
  for module in /modules/*; do
    [ -e "$module" ] || continue
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
  # By the clock: on an emulated machine a look for a partition's name takes a second.
  read_uptime
  until_s=$((UPTIME_S + WAIT_S))
  until device=$(find_device "$ROOT"); do
    read_uptime
    if [ -z "$said" ] && [ $UPTIME_S -ge $until_s ]; then
      problem="no $ROOT after $WAIT_S s; there are: $(list_devices)"
      [ -n "$FOREVER" ] || fail "$problem"
      say "$problem; waiting on (rootwait)"
      said=yes
    fi
    sleep 0.05
  done
  mount_root "$device" || fail "$device is none of: $(grep -v nodev /proc/filesystems | tr -s '\t\n' '  ')"
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
