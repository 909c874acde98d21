# Searches a folder of videos: docs/search.md has the commands.
FROM python:3.12-slim

# cuda: for NVIDIA GPUs.
ARG EXTRA=cpu

WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY configs configs
COPY data_prep data_prep
COPY drl_jax drl_jax
RUN pip install --no-cache-dir "/src[${EXTRA},hub,watch]"

# What it writes: indexes, downloaded weights and compiled programs.
RUN mkdir /state && chown 1000:1000 /state
VOLUME /state
ENV HOME=/state USER=drl_jax
USER 1000:1000
WORKDIR /state
EXPOSE 8000
# Ends the server as Ctrl-C does.
STOPSIGNAL SIGINT
HEALTHCHECK --start-period=5m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=9)"]
ENTRYPOINT ["drl_jax"]
CMD ["search", "/videos", "--index=/state/index", "--yes", "--watch", "--host=0.0.0.0"]
