# The environment of this repository on a machine with NVIDIA GPUs. Nobody has built it on one yet.
#
#   docker build -t clips-mllm .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/opt/clips-mllm/runs" clips-mllm scripts/pretrain_clips.py
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# g++ is for train.compile=true alone.
# hadolint ignore=DL3008
RUN apt-get update \
  && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ git python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --create-home --uid 1001 clips \
  && install -d -o clips -g clips /opt/clips-mllm
USER 1001
WORKDIR /opt/clips-mllm
COPY --chown=clips:clips . .
# No driver is at hand while an image is built, so torch comes from pip's index: it needs a driver for CUDA 13.
RUN source scripts/install.sh && install demo chat dev
ENV PATH="/opt/clips-mllm/.venv/bin:$PATH"
ENTRYPOINT ["python"]
CMD ["-m", "pytest", "tests/gpu"]
