#!/usr/bin/env bash
# The study of docs/results/detr.md into a folder; the same call continues an interrupted one.
# The teacher, then what each set-prediction student starts from, then five methods on three seeds for each student.
set -euo pipefail
out=${1:?name a folder for the runs}
here=$(cd "$(dirname "$0")" && pwd)
run="${PYTHON:-python} -m pcdistill"
teacher="$out/teacher/student.safetensors"
$run train "$here/teacher.yaml" --out "$out/teacher"
for student in faster-rcnn rt-detr d-fine; do
  from=()
  if [ "$student" != faster-rcnn ]; then  # which learns from random weights in four epochs what they do not
    $run train "$here/$student.yaml" --epochs 30 --out "$out/start/$student"
    from=(--student-weights "$out/start/$student/student.safetensors")
  fi
  $run compare "$here/$student.yaml" --teacher-weights "$teacher" "${from[@]}" \
    --methods none,kd,pcd,pkd,dfmsd --seeds 3 --jobs 1 --threads 1 --allow weak-teacher --out "$out/$student"
done
