# A model behind llama2's server:
#
#   docker build -t llama2 .
#   docker run -p 8000:8000 -v ./my-model:/model:ro -v ./keys.txt:/keys.txt:ro llama2
#
# By default PyTorch's CUDA build comes with it (run with --gpus all). For the small CPU build name PyTorch's own CPU index:
#
#   docker build -t llama2 --build-arg PIP_EXTRA_INDEX_URL=... .
FROM python:3.13-slim
# A C compiler builds the CPU's kernels when they are first needed; without one plain PyTorch is used, which is slower.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home llama2
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY llama2 llama2
ARG PIP_EXTRA_INDEX_URL=
RUN pip install --no-cache-dir -c constraints.txt .
USER llama2
WORKDIR /home/llama2
EXPOSE 8000
# SIGTERM reaches the server itself, which lets running answers end.
ENTRYPOINT ["llama2", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--api-keys", "/keys.txt"]
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
