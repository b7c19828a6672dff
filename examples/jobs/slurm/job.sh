#!/bin/bash
#SBATCH --job-name=quickstart
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=2577M
#SBATCH --time=01:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --open-mode=append
#SBATCH --output=quickstart-%j.log
#SBATCH --requeue
# STORE is a directory that every node sees and that outlives the job; another one: STORE=/nfs/store sbatch job.sh
STORE=${STORE:-$SLURM_SUBMIT_DIR/store}
export OPTIKIT_HOME="$STORE/home"
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
mkdir -p "$STORE" || exit 73
[ -x "$STORE/venv"/bin/optikit ] || { python3 -m venv "$STORE/venv" && "$STORE/venv"/bin/pip install --quiet optikit==0.1.0; } || exit 69
PATH="$STORE/venv/bin:$PATH"

again() {  # the time is nearly over, or somebody more urgent wants the node: stop well, and queue again
  trap '' TERM
  kill -TERM "$run" 2>/dev/null
  wait "$run"
  scontrol requeue "$SLURM_JOB_ID"
  exit 143
}
trap again TERM
optikit run "$SLURM_SUBMIT_DIR/recipe.yaml" --out "$STORE/quickstart/out" --progress plain &
run=$!
wait "$run"
