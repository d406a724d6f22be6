# Lines that each batch job begins with, before the run: copy this and name the copy in AGENT_SLURM_PREAMBLE.
# A login shell reads them, so that `module` is there if the nodes' profile makes it.
# A line that fails does not end the job; write `|| exit 1` where it should. What is said here is in the run's slurm.log.
#
# module load apptainer || exit 1
# export http_proxy=
ulimit -c 0
