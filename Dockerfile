# The CPU server.  docker build -t nibble .  &&  docker run -p 8000:8000 nibble
# On a GPU:        docker build -t nibble:gpu --target gpu --build-arg EXTRAS=tracing,gpu .
#
# On x86 the default torch wheel carries CUDA. For an image a third of the size, point pip at PyTorch's CPU wheels:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU wheel index> -t nibble .

FROM python:3.12-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL}
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server server
COPY engine engine
COPY kvcache kvcache
COPY kernels kernels
COPY demo demo
ARG EXTRAS=tracing
RUN python -m venv /opt/nibble && /opt/nibble/bin/pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM python:3.12-slim AS cpu
RUN useradd --system --uid 10001 --create-home nibble && mkdir /models && chown nibble /models
COPY --from=build /opt/nibble /opt/nibble
ENV PATH=/opt/nibble/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/models NIBBLE_HOST=0.0.0.0 NIBBLE_PORT=8000
USER nibble
WORKDIR /home/nibble
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["nibble", "serve"]

# Triton compiles kernels when they first run. What it makes are programs, which /tmp of a confined container refuses.
FROM cpu AS gpu
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV TRITON_CACHE_DIR=/models/.triton
USER nibble

FROM cpu
