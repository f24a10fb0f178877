# DeServe for NVIDIA GPUs: docker build -t deserve . && docker run --gpus all --network host --shm-size 8g -v DIR:/data deserve \
#   torchrun --nproc-per-node=2 -m deserve.run model.path=/data/model workload.source=/data/in.jsonl output.dir=/data/out
# Not built yet by the project: read it before you rely on it. FlashInfer compiles some kernels at first use, hence `devel`.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv python3-dev ninja-build && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/deserve
ENV PATH=/opt/deserve/bin:$PATH
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt '/src[gpu]' && rm -rf /src
WORKDIR /data
CMD ["deserve", "--help"]
