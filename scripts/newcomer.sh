#!/usr/bin/env bash
# The first ten minutes of somebody new, in an empty folder without a network: each step asserts on what is printed.
# Usage: scripts/newcomer.sh [PYTHON]    (a Python in which pcdistill is installed)
set -euo pipefail

python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/Übung eins"
cd "$work/Übung eins"
export HF_ENDPOINT=http://127.0.0.1:9 HF_HOME="$work/hub" TORCH_HOME="$work/torch" PYTHONUTF8=1
log="$work/log"

# step CODE COMMAND...: run it, all that it prints in one log, and compare its exit code.
step() {
    local wanted=$1 code=0
    shift
    echo "newcomer: pcdistill $*"
    "$python" -m pcdistill "$@" >"$log" 2>&1 || code=$?
    if [[ $code != "$wanted" ]]; then
        echo "newcomer: exit code $code, not $wanted:" && cat "$log" && exit 1
    fi
}

says() {
    local text
    for text in "$@"; do
        grep -qF -- "$text" "$log" || { echo "newcomer: this was not printed: $text" && cat "$log" && exit 1; }
    done
}

says_not() {
    if grep -qF -- "$1" "$log"; then echo "newcomer: this was printed: $1" && cat "$log" && exit 1; fi
}

"$python" - <<'END'
from pathlib import Path

import numpy as np
from PIL import Image

random = np.random.default_rng(0)
for label, name in enumerate(("Birnen", "Kirschen süß", "Äpfel rot")):
    folder = Path("Meine Fotos") / name
    folder.mkdir(parents=True)
    for number in range(60):
        pixels = random.integers(0, 120, (40, 50, 3))
        pixels[..., label] += 100
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"Bild {number}.png")
END

step 0 --version
says "pcdistill 0."
step 0 list models 'resnet18*'
says "timm/resnet18" "torchvision/resnet18"
says_not "resnet50"
step 2 distill "Meine Fotos" --lr -1
says "--lr: input should be greater than 0, got -1.0"
step 2 distill "Meine Fotos" --method pcd --set losses.pcd.stages=2 --print-config
says "stages must be at most C // 2 = 1 for 3 classes"

# Without a network, without names of models: one sentence, and no half minute of tries.
started=$SECONDS
step 1 distill "Meine Fotos"
says "no --student was named: timm/resnet18, by the size of the images" "127.0.0.1:9 cannot be reached" \
    "--teacher-weights FILE" "--teacher-pretrained False"
says_not "Retrying"
if ((SECONDS - started > 60)); then echo "newcomer: offline took $((SECONDS - started)) s" && exit 1; fi

small=(--image-size 32 --student cifar/resnet8 --batch-size 32 --allow weak-teacher)
step 0 distill "Meine Fotos" "${small[@]}" --teacher cifar/resnet14 --teacher-epochs 3 --epochs 2
says "data    Meine Fotos: 3 classes (Birnen, Kirschen süß, Äpfel rot)" "train: 162 images" \
    "val: 18 images; 10% of the training images" "hint: only 5 steps an epoch" \
    "teacher cifar/resnet14: starts from random weights, and is trained first (3 epochs)" \
    "student cifar/resnet8: starts from random weights" "dist (strength 4, temperature 4" \
    "train   2 epochs of 5 steps" "folder  runs/distill-Meine-Fotos-resnet8-dist-seed0" "of 18 images" \
    "the teacher can be used again: --teacher cifar/resnet14 --teacher-weights"
run=runs/distill-Meine-Fotos-resnet8-dist-seed0
teacher=$run/teacher/teacher.safetensors
test -s "$teacher"
test -s "$run/student.safetensors"
grep -q "temperature 4" "$run/recipe.yaml"
grep -q "temperature 4" "$run/README.md"

step 0 evaluate "$run"
says "of 18 validation images"
step 2 distill "Meine Fotos" "${small[@]}" --teacher cifar/resnet14 --teacher-epochs 3 --epochs 1 --out "$run"
says "train.epochs 2 -> 1" "--out $run-2"

step 0 cache "Meine Fotos" --image-size 32 --batch-size 32 --allow weak-teacher --teacher cifar/resnet14 \
    --teacher-weights "$teacher" --epochs 1 --out "mein Cache"
step 0 distill "Meine Fotos" "${small[@]}" --teacher-cache "mein Cache" --epochs 1 --json
says "teacher cifar/resnet14: its logits come from mein Cache" '"status": "done"' "dist-seed0-"
says_not "training the teacher"

echo "newcomer: all as it should be, $SECONDS s"
