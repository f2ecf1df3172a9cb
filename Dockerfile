# docker build -t camoxpert . && docker run --rm camoxpert     runs every check of `make test`.
FROM python:3.12-slim

# git: run.json names the commit. chromium: tests look at the page of `serve`.
RUN apt-get update && apt-get install --yes --no-install-recommends chromium git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /camoxpert
COPY pyproject.toml README.md LICENSE Makefile ./
COPY camoxpert camoxpert
# The environment is a layer of its own: a changed test installs nothing.
RUN make environment VENV=/opt/venv
COPY . .
CMD ["make", "test", "VENV=/opt/venv"]
