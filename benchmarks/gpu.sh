#!/usr/bin/env bash
# Everything that needs a GPU, in one command; a part at a time, each with its own limit.
#
#     bash benchmarks/gpu.sh [--rehearse] OUT [PART ...]
#     bash benchmarks/gpu.sh results ceilings kernels
#     bash benchmarks/gpu.sh --rehearse runs/rehearsal
#
#   --rehearse runs every part, or those named, at tiny size on a CPU: shows that they go through,
#            and measures nothing, as each record then says (rehearsal.py). OUT is its own.
#   OUT      folder of what comes back: PART.json for each part, log.txt
#   PART     which, in this order            [ceilings tests checks kernels optimizer tune]
#            Others want a call of their own: attention; update, after attention was chosen;
#            ledger, data, checkpoint, edit, scaling, parity and step, which need what the trainer
#            does (datasets, tyro, ...); scaling takes one GPU's speed from an update.json in OUT or
#            FROM; parity, step and sdxl need REFERENCE, and accelerate.
#
# and as variables:
#
#   REFERENCE  a checkout of huggingface/diffusers, or its train_instruct_pix2pix.py; of sdxl that
#              of XL beside it
#   LIMIT_S  seconds for all of it                                         [570]
#   FROM     folder of an earlier run's JSON: parts that are complete there are skipped, the
#            kernel benchmark and attention go on where they stopped
#   WHEELS   folder of wheels to install beside the machine's packages first
#   COMMIT   what the tree was made from, where it comes without .git
#   FLAGS    for kernels and tune, which leave attention out: "--op geglu --shapes sd15-512"
#   PYTHON   with torch and triton                                         [python3]
#
# Nothing here changes a setting of the card. Exit code 1 if a part failed, 2 for a mistake above.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
rehearsing=0
if [[ ${1:-} == --rehearse ]]; then
  rehearsing=1 REFERENCE=${REFERENCE:-tests/benchmarks/small_script.py}
  shift
fi
OUT=${1:-} PARTS="${*:2}" REFERENCE=${REFERENCE:-}
LIMIT_S=${LIMIT_S:-570} PYTHON=${PYTHON:-python3} FROM=${FROM:-} WHEELS=${WHEELS:-}
read -ra commit <<<"${COMMIT:+--commit $COMMIT}"
read -ra extra <<<"${FLAGS:-}"
KNOWN="ceilings tests checks kernels optimizer tune attention update ledger data checkpoint edit scaling"
KNOWN+=" parity step sdxl"
USUAL="ceilings tests checks kernels optimizer tune"
((rehearsing)) && PARTS=${PARTS:-$KNOWN} || PARTS=${PARTS:-$USUAL}
REHEARSAL="none: a rehearsal, nothing is measured" # as rehearsal.py has it
# Attention takes ten minutes by itself; PyTorch's compiler leaves its definition as it is.
OPS="group_norm add_group_norm layer_norm add_layer_norm geglu edit_input weighted_mse"
ATTENTION="--op attention --shapes sd15-256,sd15-512,sd15-1024,sdxl-512,sdxl-1024 --modes graph"

mistake() {
  printf 'gpu.sh: %s\n' "$1" >&2
  exit 2
}

[[ -n $OUT ]] || mistake "no OUT: give a folder, then parts: $KNOWN"
for part in $PARTS; do
  [[ " $KNOWN " == *" $part "* ]] || mistake "there is no part $part; give some of: $KNOWN"
  [[ " parity step sdxl " != *" $part "* || -n $REFERENCE ]] ||
    mistake "$part needs REFERENCE, a checkout of huggingface/diffusers"
done
[[ $LIMIT_S =~ ^[1-9][0-9]*$ ]] || mistake "LIMIT_S is $LIMIT_S; give seconds, a whole number"
command -v "$PYTHON" >/dev/null || mistake "PYTHON is $PYTHON, which is not there; give a Python"
mkdir -p "$OUT" || mistake "OUT is $OUT, which cannot be made; give a folder"
for folder in "$OUT" ${FROM:+"$FROM"}; do
  for file in "$folder"/*.json; do
    [[ -e $file ]] || continue
    grep -q "$REHEARSAL" "$file" && of_rehearsal=1 || of_rehearsal=0
    ((of_rehearsal == rehearsing)) ||
      mistake "$file is there: rehearsals and measurements need a folder each"
  done
done
if [[ -n $FROM ]]; then
  [[ -d $FROM ]] || mistake "FROM is $FROM, which is no folder; give an earlier OUT"
  find "$FROM" -maxdepth 1 -name '*.json' -exec cp -n -t "$OUT" {} +
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1
if [[ -n $WHEELS ]]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --target "$work/site" "$WHEELS"/*.whl || mistake "WHEELS is $WHEELS: pip could not install them"
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
# The namespace that an install makes, as links: nothing is built and nothing installed.
mkdir -p "$work/links/fusedit"
for folder in kernels trainer launch benchmarks; do
  ln -s "$PWD/$folder" "$work/links/fusedit/$folder"
done
mkdir "$work/links/fusedit-0.dist-info" # a run writes the version down
printf 'Metadata-Version: 2.1\nName: fusedit\nVersion: 0\n' >"$work/links/fusedit-0.dist-info/METADATA"
export PYTHONPATH=$work/links${PYTHONPATH:+:$PYTHONPATH}

summary=() failed=0

run() { # run PART LIMIT_S COMMAND...: unless it is done, and no longer than is left
  local part=$1 limit=$2 started=$SECONDS status left=$((LIMIT_S - SECONDS))
  shift 2
  [[ " $PARTS " == *" ${part%%-*} "* ]] || return 0 # attention-4 is of the part attention
  if grep -qs '^ "complete": true' "$OUT/$part.json"; then
    summary+=("$part: done before")
    return 0
  fi
  if ((left < 5)); then
    summary+=("$part: no time left")
    failed=1
    return 0
  fi
  printf '\n== %s\n' "$part"
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" </dev/null
  status=$?
  case $status in
  0) summary+=("$part: done, $((SECONDS - started)) s") ;;
  124 | 137) summary+=("$part: stopped at its limit, $((SECONDS - started)) s") failed=1 ;;
  *) summary+=("$part: exit code $status, $((SECONDS - started)) s") failed=1 ;;
  esac
}

module() { # module NAME FLAGS...: the command of a module
  local command=("$PYTHON" -m "fusedit.benchmarks.$1")
  ((rehearsing)) && command=("$PYTHON" -m fusedit.benchmarks.rehearsal "$1")
  printf '%s\0' "${command[@]}" "${@:2}"
}

part() { # part NAME LIMIT_S MODULE FLAGS...
  local command
  mapfile -d '' -t command < <(module "${@:3}" --out "$OUT" "${commit[@]}")
  run "$1" "$2" "${command[@]}"
}

seconds() { # seconds MOST REST: for shapes, with a rest for the last one and what comes after
  local left=$((LIMIT_S - SECONDS - $2))
  echo $((left > $1 ? $1 : left > 15 ? left : 15))
}

everything() {
  local ops attention choose pixels speed=()
  read -ra ops <<<"--op $OPS"
  read -ra attention <<<"$ATTENTION --only_json"
  part ceilings 60 gpu ceilings
  part tests 200 gpu tests --limit_s 190
  part checks 120 gpu checks
  part kernels 420 kernels --only_json --limit_s "$(seconds 380 45)" "${ops[@]}" "${extra[@]}"
  part optimizer 90 optimizer
  part tune 540 kernels --tune --limit_s 500 "${ops[@]}" "${extra[@]}"
  part attention 460 kernels --name attention "${attention[@]}" --without compile \
    --limit_s "$(seconds 420 150)"
  part attention-4 150 kernels --name attention-4 "${attention[@]}" --batch 4 \
    --without compile sdpa-efficient flex flash-attn --limit_s "$(seconds 120 35)"
  mapfile -d '' -t choose < <(module choose "$OUT/attention.json" "$OUT/attention-4.json" \
    --out "$OUT/attention-choices.json")
  run attention-choices 30 "${choose[@]}"
  part update 560 update --limit_s "$(seconds 460 100)"
  part ledger 560 ledger --work "$work/ledger"
  part data 560 data --folder "$work"
  part checkpoint 560 checkpoint --folder "$work"
  part edit 560 edit --work "$work/edit"
  grep -qs '^ "complete": true' "$OUT/update.json" && speed=(--update "$OUT/update.json")
  part scaling 560 scaling --work "$work/ledger" "${speed[@]}"
  local script=(--reference "$REFERENCE" --work "$work/reference")
  part parity-sd15 540 parity --preset sd15 "${script[@]}"
  part step-tuned-256 540 step --name step-tuned-256 --preset tuned --pixels 256 "${script[@]}"
  ((rehearsing)) || # at tiny size it is the same
    part step-tuned-512 540 step --name step-tuned-512 --preset tuned --pixels 512 "${script[@]}"
  part step-as-shipped 540 step --name step-as-shipped --preset as-shipped "${script[@]}"
  for pixels in 512 1024; do
    ((rehearsing && pixels > 512)) && continue # as above
    part "sdxl-tuned-$pixels" 540 step --name "sdxl-tuned-$pixels" --preset sdxl-tuned \
      --pixels "$pixels" "${script[@]}"
  done
  part sdxl-as-shipped 540 step --name sdxl-as-shipped --preset sdxl --pixels 512 "${script[@]}"
  printf '\n== summary\n'
  printf '%s\n' "${summary[@]}"
  files=$(find "$OUT" -maxdepth 1 -type f | wc -l)
  ((files <= 8 || rehearsing)) || printf '%s files in OUT: a lent machine may send back 8\n' "$files"
  return "$failed"
}

everything 2>&1 | tee -a "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
