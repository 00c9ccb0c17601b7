# Build the image:
#   docker build -t influence .
# Run all experiments on embedded data (preset smoke) and draw their figures:
#   docker run -v $PWD/out:/out influence
# Run one experiment on the real data in the folder DATA:
#   docker run -v $PWD/out:/out -v DATA:/data:ro influence fig2 --preset paper
# User 1000 owns the files in /out. To own them yourself, create the folder out first, and add
# --user $(id -u).
FROM python:3.11-slim-bookworm

# For a GPU, build with --build-arg TENSORFLOW='tensorflow[and-cuda]'. requirements.txt sets the
# version.
ARG TENSORFLOW=tensorflow
WORKDIR /app
COPY requirements.txt .
RUN sed "s/^tensorflow==/${TENSORFLOW}==/" requirements.txt > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir --root-user-action=ignore \
        --disable-pip-version-check -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Any user may write to the home folder and to /out, so that `docker run --user` works.
RUN useradd --uid 1000 --home-dir /home/influence --create-home influence \
    && mkdir /out /data && chmod 1777 /home/influence /out
ENV HOME=/home/influence \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    INFLUENCE_DATA=/data \
    INFLUENCE_OUT=/out

COPY LICENSE influence_console.py ./
COPY influence influence
COPY data data
COPY experiments experiments
# With --build-arg COMMIT=$(git rev-parse HEAD) the records name the commit. This argument comes
# last, because a new value invalidates the cache of all later build steps.
ARG COMMIT=
ENV INFLUENCE_COMMIT=$COMMIT

USER influence
ENTRYPOINT ["python", "-m", "experiments"]
CMD ["all", "--preset", "smoke"]
