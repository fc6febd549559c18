// Runs a TensorRT engine of simprune-deploy on a raw image, and prints the five best classes and the time.
//
//   simprune_run ENGINE IMAGE [--plugin LIBRARY] [--threshold T] [--runs N]
//
// IMAGE holds the input's numbers and nothing else, in the engine's own type and order; several images one
// after the other are one batch. The golden cases make one:
//
//   python -c "import numpy; numpy.load('golden.npz')['images'][:1].tofile('image.raw')"

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "engine_metadata.h"

namespace {

constexpr int kBest = 5;
constexpr int kWarmUp = 10;

struct Arguments {
    std::string engine;
    std::string image;
    std::string plugin;
    float threshold = -2;  // below every cosine: not given
    int runs = 100;
};

// Keeps TensorRT's first error for the one line that this program ends with.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kERROR && m_reason.empty()) {
            m_reason.assign(message).erase(std::min(m_reason.find('\n'), m_reason.size()));
        }
    }
    std::string reason() const { return m_reason.empty() ? "it gave no reason" : m_reason; }

private:
    std::string m_reason;
};

void check(cudaError_t code, char const* what) {
    if (code != cudaSuccess) {
        throw Failure(std::string(what) + " failed: " + cudaGetErrorString(code));
    }
}

void need(bool good, std::string const& what, Logger const& logger) {
    if (!good) {
        throw Failure("TensorRT, " + what + ": " + logger.reason());
    }
}

// Device memory, a stream and an event, given back when they go out of scope.
struct DeviceFree {
    void operator()(void* memory) const { cudaFree(memory); }
};
using DeviceMemory = std::unique_ptr<void, DeviceFree>;

DeviceMemory allocate(std::size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    return DeviceMemory(memory);
}

struct Stream {
    cudaStream_t handle = nullptr;
    Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "cudaStreamCreate"); }
    ~Stream() { cudaStreamDestroy(handle); }
    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;
};

struct Event {
    cudaEvent_t handle = nullptr;
    Event() { check(cudaEventCreate(&handle), "cudaEventCreate"); }
    ~Event() { cudaEventDestroy(handle); }
    Event(Event const&) = delete;
    Event& operator=(Event const&) = delete;
};

Arguments parse(int argc, char** argv) {
    Arguments arguments;
    std::vector<std::string> files;
    for (int i = 1; i < argc; ++i) {
        std::string const name = argv[i];
        if (name.rfind("--", 0) != 0) {
            files.push_back(name);
            continue;
        }
        if (++i == argc) {
            throw Failure(name + " needs a value");
        }
        try {
            if (name == "--plugin") {
                arguments.plugin = argv[i];
            } else if (name == "--threshold") {
                arguments.threshold = std::stof(argv[i]);
            } else if (name == "--runs") {
                arguments.runs = std::stoi(argv[i]);
            } else {
                throw Failure("unknown option " + name);
            }
        } catch (std::logic_error const&) {  // std::stof's and std::stoi's
            throw Failure(name + " " + argv[i] + " is not a number");
        }
    }
    if (files.size() != 2 || arguments.runs < 1) {
        throw Failure("usage: simprune_run ENGINE IMAGE [--plugin LIBRARY] [--threshold T] [--runs N]");
    }
    arguments.engine = files[0];
    arguments.image = files[1];
    return arguments;
}

std::vector<char> readFile(std::string const& path) {
    std::error_code error;
    std::uintmax_t const size = std::filesystem::file_size(path, error);
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes(error ? 0 : size);
    if (error || !file.read(bytes.data(), static_cast<std::streamsize>(size))) {
        throw Failure(path + " cannot be read");
    }
    return bytes;
}

std::string thisGpu() {
    int count = 0;
    cudaError_t const code = cudaGetDeviceCount(&count);
    if (code != cudaSuccess || count == 0) {
        throw Failure(std::string("no GPU was found: ") + cudaGetErrorString(code));
    }
    int major = 0;
    int minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "cudaDeviceGetAttribute");
    return std::to_string(major) + "." + std::to_string(minor);
}

std::string thisTensorRT() {
    int const version = getInferLibVersion();  // 100300 for 10.3.0
    return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
           std::to_string(version % 100);
}

std::size_t bytesOf(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
            return 4;
        case nvinfer1::DataType::kUINT8:
            return 1;
        default:
            throw Failure("this program reads float32 and uint8, and the engine has another type");
    }
}

std::size_t volume(nvinfer1::Dims const& shape, int from) {
    std::size_t product = 1;
    for (int i = from; i < shape.nbDims; ++i) {
        if (shape.d[i] < 1) {
            throw Failure("a size depends on the image, which this program does not handle");
        }
        product *= static_cast<std::size_t>(shape.d[i]);
    }
    return product;
}

void printBest(float const* scores, std::size_t count, std::size_t image) {
    if (count == 1) {  // a logit or a regression: no class is larger than another
        std::printf("image %zu: output %.4f\n", image, scores[0]);
        return;
    }
    std::vector<std::size_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::size_t const shown = std::min<std::size_t>(kBest, count);
    std::partial_sort(order.begin(), order.begin() + shown, order.end(), [scores](std::size_t a, std::size_t b) {
        return scores[a] > scores[b];
    });
    std::printf("image %zu:", image);
    for (std::size_t i = 0; i < shown; ++i) {
        std::printf(" class %zu (%.4f)%s", order[i], scores[order[i]], i + 1 < shown ? "," : "\n");
    }
}

void run(Arguments const& arguments) {
    // What does not fit is said before TensorRT sees a byte of the engine
    EngineMetadata const engine_metadata = readEngineMetadata(arguments.engine);
    std::vector<char> const image = readFile(arguments.image);
    std::vector<char> const plan = readFile(arguments.engine);
    if (plan.size() != engine_metadata.bytes) {
        throw Failure(arguments.engine + " is not the engine that was built: its size differs");
    }
    if (!engine_metadata.plugin.empty() && arguments.plugin.empty()) {
        throw Failure("the engine has the plugin of " + engine_metadata.plugin + " in it: name it with --plugin");
    }
    checkTensorRT(engine_metadata, thisTensorRT());
    checkGpu(engine_metadata, thisGpu());

    Logger logger;
    if (!arguments.plugin.empty()) {
        need(getPluginRegistry()->loadLibrary(arguments.plugin.c_str()) != nullptr, "loading the plugin", logger);
    }
    std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
    need(runtime != nullptr, "starting", logger);
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    need(engine != nullptr, "loading the engine", logger);
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
    need(context != nullptr, "making a context", logger);

    // Inputs: the images, and the threshold where there is one
    Stream stream;
    std::vector<DeviceMemory> memory;
    std::string output;
    std::size_t batch = 0;
    for (int i = 0; i < engine->getNbIOTensors(); ++i) {
        char const* name = engine->getIOTensorName(i);
        if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kOUTPUT) {
            if (!output.empty()) {
                throw Failure("the engine has a second output: export without --emit-assignments");
            }
            output = name;
            continue;
        }
        nvinfer1::Dims shape = engine->getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMAX);
        bool const isThreshold = std::string(name) == "threshold";
        std::size_t const bytes = isThreshold ? sizeof(float) : image.size();
        if (isThreshold) {
            if (arguments.threshold < -1) {
                throw Failure("the engine takes a threshold: give it with --threshold");
            }
            shape.d[0] = 1;
        } else {
            std::size_t const one = volume(shape, 1) * bytesOf(engine->getTensorDataType(name));
            batch = image.size() / one;
            std::int64_t const least = engine->getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMIN).d[0];
            std::int64_t const most = shape.d[0];
            if (image.size() % one != 0 || static_cast<std::int64_t>(batch) < least ||
                static_cast<std::int64_t>(batch) > most) {
                throw Failure(
                    arguments.image + " has " + std::to_string(image.size()) + " bytes, and the engine takes " +
                    std::to_string(least) + " to " + std::to_string(most) + " images of " + std::to_string(one));
            }
            shape.d[0] = static_cast<decltype(shape.d[0] + 0)>(batch);
        }
        need(context->setInputShape(name, shape), "setting a shape", logger);
        void const* source = isThreshold ? static_cast<void const*>(&arguments.threshold) : image.data();
        memory.push_back(allocate(bytes));
        check(
            cudaMemcpyAsync(memory.back().get(), source, bytes, cudaMemcpyHostToDevice, stream.handle),
            "cudaMemcpyAsync");
        need(context->setTensorAddress(name, memory.back().get()), "setting an address", logger);
    }

    nvinfer1::Dims const shape = context->getTensorShape(output.c_str());
    std::vector<float> scores(volume(shape, 0));
    if (engine->getTensorDataType(output.c_str()) != nvinfer1::DataType::kFLOAT || batch == 0) {
        throw Failure("the engine has no float32 output or no images, so it is not of simprune-deploy");
    }
    DeviceMemory const result = allocate(scores.size() * sizeof(float));
    need(context->setTensorAddress(output.c_str(), result.get()), "setting an address", logger);

    Event start;
    Event end;
    for (int i = 0; i < kWarmUp; ++i) {
        need(context->enqueueV3(stream.handle), "running", logger);
    }
    check(cudaEventRecord(start.handle, stream.handle), "cudaEventRecord");
    for (int i = 0; i < arguments.runs; ++i) {
        need(context->enqueueV3(stream.handle), "running", logger);
    }
    check(cudaEventRecord(end.handle, stream.handle), "cudaEventRecord");
    check(
        cudaMemcpyAsync(
            scores.data(), result.get(), scores.size() * sizeof(float), cudaMemcpyDeviceToHost, stream.handle),
        "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream.handle), "running");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start.handle, end.handle), "cudaEventElapsedTime");

    std::size_t const classes = scores.size() / batch;
    for (std::size_t i = 0; i < batch; ++i) {
        printBest(scores.data() + i * classes, classes, i);
    }
    std::printf(
        "%.3f ms a batch of %zu, mean of %d runs on the GPU\n", milliseconds / arguments.runs, batch, arguments.runs);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        run(parse(argc, argv));
        return 0;
    } catch (std::exception const& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
