# querydet: predicts and trains, and serves a folder of `querydet export --format web`. docs/deployment.md has the commands.
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
# What jax runs on: "" (CPUs), "cuda12", "cuda13" or "tpu", which are extras of jax.
ARG JAX=""
# Extras of pyproject.toml, such as "video" or "video,onnx".
ARG EXTRAS=""
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    set -- /wheels/*.whl && pip install --no-cache-dir --no-compile "$1${EXTRAS:+[$EXTRAS]}" ${JAX:+"jax[$JAX]"}
RUN useradd --create-home querydet
USER querydet
WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["querydet"]
CMD ["--help"]
