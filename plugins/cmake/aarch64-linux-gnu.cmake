# Cross-compiles for Jetson (and other 64-bit Arm Linux) on an x86 machine.
#
#   apt-get install g++-aarch64-linux-gnu
#   pip download --no-deps --only-binary :all: --platform manylinux2014_aarch64 nvidia-cuda-runtime
#   cmake -S plugins -B build-aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake \
#       -DCMAKE_CUDA_ARCHITECTURES="87-real;110-real" \
#       -DSIMPRUNE_CUDA_TARGET_LIB=<wheel, unpacked>/nvidia/cu13/lib \
#       -DSIMPRUNE_TENSORRT_INCLUDE=<folder of NvInferRuntime.h>
#
# The CUDA headers are the same for both machines: those of the nvcc in use are taken. The library
# asks of the device a C library as new as this compiler's, and no CUDA or TensorRT to link with.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)

# nvcc without NVIDIA's cross-compilation packages finds neither its headers nor a CUDA runtime for the
# target. CMake tries the compiler with what the environment says here, and keeps it as CMAKE_CUDA_FLAGS.
find_program(simprune_nvcc nvcc PATHS /usr/local/cuda/bin)
get_filename_component(simprune_nvcc_folder "${simprune_nvcc}" DIRECTORY)
find_path(simprune_cuda_include cuda_runtime.h
  HINTS "$ENV{CUDA_HOME}/include" "${simprune_nvcc_folder}/../include" PATHS /usr/local/cuda/include
  NO_CMAKE_FIND_ROOT_PATH)
if(SIMPRUNE_CUDA_TARGET_LIB)
  foreach(folder "${simprune_cuda_include}" "${SIMPRUNE_CUDA_TARGET_LIB}")
    if(folder MATCHES "[] \t\"'`$&;|<>()*?!#\\{}[]")
      message(FATAL_ERROR "the folder ${folder} has '${CMAKE_MATCH_0}' in its name, which nvcc's options cannot hold: name it by a symbolic link")
    endif()
  endforeach()
  set(simprune_flags "-I${simprune_cuda_include} -L${SIMPRUNE_CUDA_TARGET_LIB}")
  # CMake reads this file several times
  string(FIND "$ENV{CUDAFLAGS}" "${simprune_flags}" simprune_there)
  if(simprune_there EQUAL -1)
    set(ENV{CUDAFLAGS} "${simprune_flags} $ENV{CUDAFLAGS}")
  endif()
endif()
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES SIMPRUNE_CUDA_TARGET_LIB)

set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE BOTH)
