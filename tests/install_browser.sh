#!/bin/sh
# Chromium for the screenshots of the HTML report, where it can be installed (about 350 MB).
set -eu
for browser in chromium chromium-browser google-chrome; do
    if command -v "$browser" > /dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "no chromium: the screenshots of the HTML report will be skipped" >&2
    exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null
