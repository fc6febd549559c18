#!/bin/sh
# The Arm cross-compiler and emulator for the test of the Jetson library, where they can be installed.
set -eu
if command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "no aarch64-linux-gnu-g++ or qemu-aarch64: the test of the Jetson library will be skipped" >&2
    exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user > /dev/null
