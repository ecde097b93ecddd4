# shellcheck shell=bash
# The environment of every `badloss run --distributed`; each platform's file sources it. What is set already stays.
#
# Only what jax 0.10 and 0.11 do not do by themselves. On TPUs nothing: jax sets libtpu's launch barrier and the rest.
# Memory stays at jax's 75 % of a GPU: NCCL and cuDNN live in what is left.

if [ -e /dev/nvidiactl ]; then
  # Sums gradients over GPUs while the backward pass goes on. Off in XLA by default, on in NVIDIA's own JAX images:
  # docs.nvidia.com/jax-toolbox/environment-variables
  export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
  # NCCL says why it failed ("production minimum"): docs.nvidia.com/deeplearning/nccl, Troubleshooting, Logging
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
fi

# jax aborts a process whose peers are gone. It then shows where it was (docs.python.org/3/library/faulthandler.html),
# and what it had printed is not lost (jax's own advice in that message).
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
