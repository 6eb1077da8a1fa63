# Reads the flags of demo.sh and quiet.sh, which source this with their arguments. They set the defaults before: caller,
# output, train_videos, test_videos, steps, device; serve where it is a flag; and script, whose header is the help.
unknown_flag() {
  echo "error: unknown flag $1 (see --help)" >&2
  exit 2
}
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$script"; exit 0 ;;
    --serve) [ -n "${serve+set}" ] || unknown_flag "$1"; serve=yes; shift ;;
    --output | --train-videos | --test-videos | --steps | --device)
      if [ -z "${2:-}" ]; then echo "error: $1 needs a value (see --help)" >&2; exit 2; fi
      name=${1#--}
      printf -v "${name//-/_}" '%s' "$2"
      shift 2 ;;
    *) unknown_flag "$1" ;;
  esac
done
for name in train_videos test_videos steps; do
  if ! [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]]; then
    echo "error: --${name//_/-} ${!name}: give a positive integer" >&2
    exit 2
  fi
done
on_cpu=() train_on_cpu=()
case $device in
  "") ;;
  cpu) on_cpu=(--device cpu) train_on_cpu=(--use_cpu True) ;;
  *) echo "error: --device $device: give cpu, or remove the flag to use a GPU if there is one" >&2; exit 2 ;;
esac
case $output in /*) ;; *) output=$caller/$output ;; esac
