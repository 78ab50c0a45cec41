#!/usr/bin/env bash
# Everything that needs a GPU, in phases, most valuable first; a call lasts at most nine minutes, unless it is told to.
#
#   benchmarks/gpu_check.sh OUTDIR [--dry-run] [--only PHASE]... [--redo PHASE]...
#
# Each phase keeps its files and its log in OUTDIR/PHASE and writes OUTDIR/PHASE/status when it has ended; a later call
# with the same OUTDIR skips what has ended and goes on. A phase cut off by the end of the call, or skipped for want of a
# package, is started again by the next one; one that failed is, where --redo names it. After each phase OUTDIR/report.md
# sums up all phases so far, and OUTDIR/gpu_check.tar.gz holds the small files of all: unpack it into OUTDIR to go on
# elsewhere. Ctrl-C or SIGTERM ends the phase, writes both, and leaves the phase to the next call.
#
# A GPU of your own for half an hour: GPU_CHECK_SECONDS=1700 benchmarks/gpu_check.sh OUTDIR, with nothing else on it.
# A borrowed one: the same call three times on the same machine, which keeps OUTDIR and the compilers' caches (both lie
# outside of the tree), and after each bring home OUTDIR/report.md and OUTDIR/gpu_check.tar.gz.
#   1. environment, ladder-256, tests: whether it works, and nearly every figure that the goals are stated for.
#   2. kernels, profiles, sanitizers.
#   3. with DALI on PYTHONPATH: end-to-end, native, loader; then the other batches and the largest.
# Goals in images a second are stated for an H200. A tree without its .git needs CAST_FAST_COMMIT. Where nothing can be
# downloaded and a call carries little, bring DALI (270 MB) along in parts; .wheels/ is ignored by git. At home:
#   pip download -d wheels --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 nvidia-dali-cuda130==2.4.0 \
#     nvidia-nvimgcodec-cu13==0.9.0.20 nvidia-libnvcomp-cu13==5.3.0.16 nvidia-nvjpeg nvidia-nvjpeg2k-cu13 \
#     nvidia-nvtiff-cu13 astunparse gast optree
#   tar -C wheels -c . | split -b 50M - wheels.tar.   # then one part a call as .wheels/part
# There, in order, cat .wheels/part >>/tmp/wheels.tar in six calls, the first two of gpu_check.sh among them; then
#   tar -C /tmp -xf /tmp/wheels.tar && pip install -q --no-index --no-deps --target /tmp/site /tmp/*.whl
#   PYTHONPATH=/tmp/site benchmarks/gpu_check.sh OUTDIR
# Without packaging and six, add these.
#
# Needs a CUDA device and a Python (3.10 or later) with torch, Triton, torchvision (and so Pillow), NumPy, rich and
# matplotlib. Phases that need more are skipped where it is missing, and say so: tests needs pytest, pytest-timeout,
# hypothesis and OpenCV, native these and DALI, end-to-end and loader OpenCV and DALI. Without timm, safetensors or
# tensorboard, tests leaves out the files that import them. Installs nothing and uses no network. PYTHON names the
# interpreter; CAST_FAST_COMMIT names the commit where the tree was copied without its .git; GPU_CHECK_SECONDS (530) is
# the length of a call; TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR are obeyed.
#
# Exit code: 0 all phases have ended well, 1 all have ended and some failed, 2 wrong use, no CUDA device or a missing
# package without which no phase runs, 75 phases are left for the next call, 130 interrupted.
set -uo pipefail

usage() { sed -n '4s/^#   /usage: /p' "$0"; }
fail() { printf 'gpu_check.sh: error: %s\n' "$1" >&2; exit 2; }

# name | seconds without which it is not started | its time limit | what it does
PHASES=(
  "environment|30|90|device, versions, measured ceilings: copy, matrix product, ResNet-50 convolutions"
  "ladder-256|200|500|throughput ladder at batch 256"
  "tests|150|300|the tests marked gpu"
  "kernels|150|300|each kernel against eager, torch.compile and its byte floor"
  "profile|60|150|torch.profiler: where the time of a step goes"
  "profile-streaming|60|150|the same with streaming BatchNorm"
  "memcheck|100|300|compute-sanitizer memcheck on the kernels"
  "end-to-end|90|300|DALI loader feeding the step at batch 256"
  "ladder-64|120|300|throughput ladder at batch 64"
  "memory|60|200|the largest batch that fits"
  "native|100|300|build of the native operators, CUDA backend included, and the tests that need DALI"
  "loader|150|400|DALI loader by decoder load and threads, against its peers, and what it takes from the GPU"
  "ladder-512|120|300|throughput ladder at batch 512"
  "racecheck|100|240|compute-sanitizer racecheck on the kernels"
  "choices|120|400|ways to compile the step: one key pass or two, modes of torch.compile, CUDA graphs"
  "ladder-128|120|300|throughput ladder at batch 128"
  "pointwise|60|200|prototype of a 1x1 convolution with BatchNorm statistics in its epilogue"
)

out="" dry_run=0 only=" " redo=" "
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --only | --redo)
      (($# > 1)) || fail "$1: expected a phase"
      [[ -n $2 && $'\n'$(printf '%s\n' "${PHASES[@]}") == *$'\n'"$2|"* ]] ||
        fail "$1: got $2, expected one of $(printf '%s\n' "${PHASES[@]}" | cut -d'|' -f1 | paste -sd' ')"
      if [[ $1 == --only ]]; then only+="$2 "; else redo+="$2 "; fi
      shift ;;
    -h | --help) usage; exit 0 ;;
    -*) fail "unknown flag $1 ($(usage))" ;;
    *) [[ -z $out ]] || fail "one OUTDIR expected, got $out and $1 ($(usage))"; out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || fail "OUTDIR is missing ($(usage))"
[[ ! -e $out || -d $out ]] || fail "OUTDIR: $out is not a folder"

status_of() { if [[ -s $out/$1/status ]]; then head -n 1 "$out/$1/status"; else echo waiting; fi; }
wanted() { [[ $only == " " || $only == *" $1 "* ]]; }
# What was skipped for want of a package is tried again: it may be there by now.
ended() { [[ ! $(status_of "$1") =~ ^(waiting|skipped) && $redo != *" $1 "* ]]; }

if ((dry_run)); then
  printf '%-17s %6s %6s  %-8s %s\n' phase needs limit status what
  for row in "${PHASES[@]}"; do
    IFS='|' read -r name needs limit what <<<"$row"
    wanted "$name" || continue
    printf '%-17s %5ss %5ss  %-8s %s\n' "$name" "$needs" "$limit" "$(status_of "$name" | cut -d' ' -f1)" "$what"
  done
  exit 0
fi

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
fi
command -v "$python" >/dev/null || fail "PYTHON: $python not found"
# Imported, not only looked for: a package whose shared libraries are missing is as good as absent.
probe='import importlib, os, sys
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # some packages print when they are imported
import torch
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception:
        print(name, file=answer, flush=True)
sys.exit(0 if torch.cuda.is_available() else 3)'
every_phase=(triton torchvision PIL numpy rich matplotlib)
absent=$("$python" -c "$probe" "${every_phase[@]}" pytest pytest_timeout hypothesis cv2 timm safetensors tensorboard nvidia.dali 2>/dev/null)
case $? in
  0) ;;
  3) fail "torch finds no CUDA device here; --dry-run lists the phases" ;;
  *) fail "$python cannot import torch; name another interpreter with PYTHON=…" ;;
esac
absent=" ${absent//$'\n'/ } "
absent_of() { local name; for name; do [[ $absent != *" $name "* ]] || printf '%s ' "$name"; done; }
missing=$(absent_of "${every_phase[@]}")
[[ -z $missing ]] || fail "$python lacks ${missing% }, which every phase needs; name another interpreter with PYTHON=…"

budget=${GPU_CHECK_SECONDS:-530}
[[ $budget =~ ^[0-9]+$ ]] || fail "GPU_CHECK_SECONDS: got $budget, expected a number of seconds"
mkdir -p "$out" || fail "OUTDIR: cannot make $out"
out=$(cd "$out" && pwd)
cd "$root" || exit 2
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg
# The home of a borrowed machine may be read-only or small.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/gpu_check-inductor-$UID}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/gpu_check-triton-$UID}
has() { "$python" -c "import $1" 2>/dev/null; }

# A phase gets its folder as $1 and its seconds as $2. 77 says that it does not apply here; its last line says why.
needs() { # module…
  local missing
  missing=$(absent_of "$@")
  [[ -z $missing ]] || { echo "not installed: ${missing% }"; return 77; }
}
# As timeout says it: a phase that left something out for want of time is started again if the next call has more.
complete() { # folder
  ! grep -q 'not measured.*out of time' "$1/log.txt" || return 124
}
throughput() { # batch flags…
  local batch=$1
  shift
  "$python" benchmarks/throughput.py --device cuda --arch resnet50 --size 224 --batch "$batch" "$@"
}
none_left() { # of a process group whose leader has ended: what was told to end gets 5 s, then it is killed
  local tries=25
  while ((tries-- > 0)) && kill -0 -- "-$1" 2>/dev/null; do sleep 0.2; done
  kill -KILL -- "-$1" 2>/dev/null
}
ladder() { # folder seconds batch lines flags…
  local folder=$1 seconds=$2 batch=$3 lines=$4 begin=$SECONDS
  shift 4
  # Most of a compilation is one thread of Python: all lines compile side by side, each in a process, and the ladder
  # then finds them in the cache. Five steps at batch 256 fit 80 GB together; what fails here is tried again there.
  export -f throughput
  local ahead
  tr , '\n' <<<"$lines" | grep -E '^(trunk-|moco|kernels|streaming|groups|compiled)' |
    TORCHINDUCTOR_COMPILE_THREADS=4 timeout $((seconds * 3 / 5)) xargs -P 5 -I {} bash -c \
      'throughput "$1" --compile-only --variants "$2" --out "$3"' - "$batch" {} "$folder" &
  ahead=$!
  trap 'kill -TERM "$ahead"; wait "$ahead"; none_left "$ahead"; exit 143' TERM # timeout has a process group of its own
  wait "$ahead" || echo "not every line could be compiled ahead; the ladder tries again"
  none_left "$ahead"
  trap 'exit 143' TERM
  echo "compiled side by side in $((SECONDS - begin)) s"
  seconds=$((seconds - SECONDS + begin))
  throughput "$batch" --out "$folder" --variants "$lines" --max-seconds $((seconds > 60 ? seconds - 30 : seconds / 2)) "$@" &&
    complete "$folder"
}
phase_environment() {
  nvidia-smi >"$1/nvidia-smi.txt" 2>&1
  nvidia-smi -q >"$1/nvidia-smi-q.txt" 2>&1
  "$python" -m pip list >"$1/packages.txt" 2>&1
  "$python" benchmarks/ceilings.py --device cuda --out "$1"
}
phase_tests() {
  needs pytest pytest_timeout hypothesis cv2 || return
  local workers=() ignored=() name
  has xdist && workers=(--numprocesses 6 --dist loadgroup)
  if [[ -n $(absent_of timm safetensors tensorboard) ]]; then
    for name in backgrounds downstream export grounding metrics probe; do ignored+=(--ignore "tests/test_$name.py"); done
  fi
  # Interrupted before the phase's time is over, so that pytest can say what failed until then.
  OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 CAST_FAST_REQUIRE_GPU=1 \
    timeout --foreground --signal=INT $(($2 > 60 ? $2 - 30 : $2)) "$python" -m pytest -m gpu -q -rfEs -p no:cacheprovider \
    --continue-on-collection-errors --tb=short --durations=15 --junitxml "$1/junit.xml" "${workers[@]}" "${ignored[@]}"
}
all_lines=trunk-bound,moco,published-amp,published,kernels,groups,streaming,compiled,trunk-streaming,closed-form,one-pass
few_lines=trunk-bound,moco,published-amp,kernels,groups,streaming
phase_ladder-256() { ladder "$1" "$2" 256 $all_lines; }
phase_ladder-512() { ladder "$1" "$2" 512 $few_lines; }
phase_ladder-128() { ladder "$1" "$2" 128 $few_lines; }
phase_ladder-64() { ladder "$1" "$2" 64 $few_lines; }
phase_kernels() {
  "$python" benchmarks/kernels.py --device cuda --out "$1" --max-seconds $(($2 > 60 ? $2 - 30 : $2 / 2)) && complete "$1"
}
sanitize() { # folder tool flags…
  local folder=$1 tool=$2
  shift 2
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 77; }
  # Without torch's caching allocator every tensor is an allocation of its own, so that a step past its end is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 99 --log-file "$folder/$tool.txt" \
    "$@" "$python" benchmarks/sanitizer_cases.py
}
# What torch asks of the driver and is refused while it starts is no fault of a kernel.
phase_memcheck() { sanitize "$1" memcheck --report-api-errors no; }
phase_racecheck() { sanitize "$1" racecheck; }
phase_profile() { "$python" benchmarks/profile_step.py --device cuda --line kernels --out "$1"; }
phase_profile-streaming() { "$python" benchmarks/profile_step.py --device cuda --line streaming --out "$1"; }
phase_choices() { "$python" benchmarks/compile_choices.py --device cuda --out "$1" --max-seconds $(($2 > 60 ? $2 - 30 : $2 / 2)); }
phase_pointwise() { "$python" benchmarks/prototypes/pointwise_conv.py --device cuda --out "$1"; }
phase_memory() {
  local batch tries=3 begin=$SECONDS
  batch=$("$python" benchmarks/report.py "$out" --largest-batch) || { echo "$batch"; return 77; }
  echo "largest batch expected to fit: $batch"
  while ((tries-- > 0)); do
    throughput "$batch" --out "$1" --variants groups --repeats 1 --max-seconds $(($2 - SECONDS + begin)) && return
    batch=$((batch * 93 / 100 / 32 * 32))
    echo "it does not; trying $batch"
  done
  return 1
}
phase_native() {
  needs nvidia.dali pytest pytest_timeout hypothesis cv2 || return
  local built=0
  "$python" kernels/cast_kernels/dali_plugin.py build --cuda on || built=1
  # All that the phase tests had to skip for want of DALI.
  CAST_FAST_REQUIRE_GPU=1 timeout --foreground --signal=INT $(($2 > 60 ? $2 - 30 : $2)) "$python" -m pytest -m gpu -q \
    -rfEs -p no:cacheprovider --tb=short tests/test_{dali_plugin,dali_loader,bench_loader,train}.py && return $built
}
phase_end-to-end() {
  needs nvidia.dali cv2 || return
  # Where it was not built before: without it the windows come from NumPy, which is slower.
  "$python" kernels/cast_kernels/dali_plugin.py build --optional
  ladder "$1" "$2" 256 groups,loader,end-to-end --repeats 5
}
phase_loader() {
  needs nvidia.dali cv2 || return
  "$python" benchmarks/loader.py --device cuda --repeats 3 --max-seconds $(($2 > 120 ? $2 - 60 : $2 / 2)) --out "$1"
}

# What else is on the GPU, and how hot and fast it is; before each phase, and after it.
gpu_state() { # folder
  nvidia-smi --query-gpu=timestamp,memory.used,utilization.gpu,clocks.sm,temperature.gpu,power.draw --format=csv,noheader \
    2>/dev/null >>"$1/gpu.csv"
}
sum_up() {
  "$python" benchmarks/report.py "$out" || echo "gpu_check.sh: no report could be written" >&2
  (cd "$out" && find . -type d \( -name 'scenes-*' -o -name 'packed-*' -o -name 'tiny-*' \) -prune -o \
    -type f -size -4M ! -name 'gpu_check.tar.gz*' -print0 | tar --null -czf gpu_check.tar.gz.part -T - &&
    mv gpu_check.tar.gz.part gpu_check.tar.gz)
}
# timeout hands the signal on to what it runs, and kills that 10 s later.
running="" interrupted=0
stop() { interrupted=1; [[ -z $running ]] || kill -TERM "$running" 2>/dev/null; }
trap stop INT TERM HUP

left=0 failed=0
for row in "${PHASES[@]}"; do
  IFS='|' read -r name needs limit what <<<"$row"
  wanted "$name" || continue
  if ended "$name"; then
    echo "== $name: $(status_of "$name") (ended in an earlier call)"
    [[ $(status_of "$name") == ok ]] || failed=1
    continue
  fi
  remaining=$((budget - SECONDS - 10))
  if ((remaining < needs)); then
    echo "== $name: left for the next call ($remaining s remain, it needs $needs s)"
    left=1
    continue
  fi
  ((interrupted)) && exit 130
  allotted=$((remaining < limit ? remaining : limit))
  folder=$out/$name
  mkdir -p "$folder"
  rm -f "$folder/status" "$folder/gpu.csv"
  gpu_state "$folder"
  echo "== $name: $what (at most $allotted s)"
  begin=$SECONDS
  set -m # else what runs in the background would ignore SIGINT, by which pytest is told to end
  (
    # timeout runs programs, not functions: it gets a shell that knows them. By its trap the shell outlives what it runs,
    # else timeout would end with it, and what takes its time to end, or never does, would share the GPU with the next.
    export -f ladder none_left throughput complete sanitize has needs absent_of "phase_$name"
    export python out absent all_lines few_lines
    exec timeout --signal=TERM --kill-after=10 "$allotted" bash -c "trap 'exit 143' TERM; phase_$name \"\$@\"" \
      "phase_$name" "$folder" "$allotted"
  ) >"$folder/log.txt" 2>&1 </dev/null &
  running=$!
  set +m
  while :; do # a signal ends wait before the phase has ended
    wait "$running"
    rc=$?
    kill -0 "$running" 2>/dev/null || break
  done
  running=""
  took=$((SECONDS - begin))
  gpu_state "$folder"
  tail -n 25 "$folder/log.txt"
  if ((interrupted)); then
    echo "== $name: interrupted after $took s; the next call starts it again"
    sum_up
    exit 130
  fi
  case $rc in
    0) result="ok" ;;
    77) result="skipped: $(tail -n 1 "$folder/log.txt")" ;;
    124 | 137)
      if ((allotted < limit)); then
        echo "== $name: cut off after $took s by the end of the call; the next call starts it again"
        left=1
        sum_up
        continue
      fi
      result="failed: over its limit of $limit s; what it wrote before is kept" ;;
    *) result="failed: exit code $rc" ;;
  esac
  [[ $result =~ ^(ok|skipped) ]] || failed=1
  printf '%s\n%s s\n' "$result" "$took" >"$folder/status"
  hint=""
  [[ $result == failed* ]] && hint=" (--redo $name runs it again)"
  echo "== $name: $result, $took s$hint"
  sum_up
done

if ((left)); then
  echo "gpu_check.sh: phases are left; call again with the same OUTDIR"
  exit 75
fi
exit $failed
