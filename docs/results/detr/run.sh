#!/usr/bin/env bash
# The study of docs/results/detr.md into a folder; the same call continues an interrupted one.
# The teacher, then for each student: what it starts from, and five methods on three seeds.
set -euo pipefail
out=${1:?name a folder for the runs}
here=$(cd "$(dirname "$0")" && pwd)
run="${PYTHON:-python} -m pcdistill"
$run train "$here/teacher.yaml" --out "$out/teacher"
for student in rt-detr faster-rcnn d-fine; do
  $run train "$here/$student.yaml" --epochs 12 --set data.limit=null --out "$out/start/$student"
  $run compare "$here/$student.yaml" --methods none,kd,pcd,pkd,dfmsd --seeds 3 --jobs 1 --threads 1 \
    --teacher-weights "$out/teacher/student.safetensors" \
    --student-weights "$out/start/$student/student.safetensors" --allow weak-teacher --out "$out/$student"
done
