// A plugin's life as TensorRT leads it, on host memory: configure, workspace, serialize, attach, enqueue.
#include "check.h"
#include "plugin_library.h"
#include "simprune.h"

#include <cmath>
#include <limits>

using namespace plugin_library;
using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;

namespace {

constexpr float kPad = SIMPRUNE_PAD_LOG_SIZE;
constexpr DataType kFloat = DataType::kFLOAT;

// Memory with a wall behind it and something in it, at an address that is a multiple of 256.
class Memory {
public:
    explicit Memory(size_t bytes) : bytes_(bytes), storage_(bytes + 2 * kWall, kFill) {
        void* start = storage_.data();
        size_t space = storage_.size();
        start_ = static_cast<unsigned char*>(std::align(kWall, bytes + kWall, start, space));
    }
    void* get() { return start_; }
    template <class T>
    T at(size_t index) const {
        T value;
        std::memcpy(&value, start_ + index * sizeof(T), sizeof value);
        return value;
    }
    void put(const void* data, size_t bytes) {
        if (bytes > 0) std::memcpy(start_, data, bytes);
    }
    bool wall_stands() const {
        for (size_t i = 0; i < kWall; ++i) {
            if (start_[bytes_ + i] != kFill) return false;
        }
        return true;
    }
    bool untouched() const {
        for (size_t i = 0; i < bytes_; ++i) {
            if (start_[i] != kFill) return false;
        }
        return wall_stands();
    }

private:
    static constexpr size_t kWall = 256;
    static constexpr unsigned char kFill = 0xA7;

    size_t bytes_;
    std::vector<unsigned char> storage_;
    unsigned char* start_;
};

// The small numbers of these tests are exact in all three types.
uint16_t to_half(float value) {
    if (value == 0.0f) return 0;
    int exponent = 0;
    const float fraction = std::frexp(std::fabs(value), &exponent);
    const auto mantissa = static_cast<uint16_t>(std::lround(fraction * 2048.0f) - 1024);
    return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | mantissa);
}

float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    if (exponent == 0) return 0.0f;
    return std::ldexp(1024.0f + (bits & 1023), exponent - 25) * (bits & 0x8000 ? -1.0f : 1.0f);
}

uint16_t to_bfloat(float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

float from_bfloat(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value = 0;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

size_t size_of(DataType type) {
    return type == kFloat ? 4 : 2;
}

void put_tokens(Memory& memory, const std::vector<float>& values, DataType type) {
    if (type == kFloat) return memory.put(values.data(), values.size() * sizeof(float));
    std::vector<uint16_t> narrow;
    for (const float value : values) narrow.push_back(type == DataType::kHALF ? to_half(value) : to_bfloat(value));
    memory.put(narrow.data(), narrow.size() * sizeof(uint16_t));
}

float token_at(const Memory& memory, size_t index, DataType type) {
    if (type == kFloat) return memory.at<float>(index);
    const auto bits = memory.at<uint16_t>(index);
    return type == DataType::kHALF ? from_half(bits) : from_bfloat(bits);
}

struct Images {
    int64_t batch, num_tokens, dim;
    std::vector<float> tokens, log_size, threshold;
    // Without features the tokens are compared, and TensorRT gives their address twice
    int64_t feature_dim = 0;
    std::vector<float> features = {};

    int64_t compared() const { return feature_dim > 0 ? feature_dim : dim; }
    int64_t thresholds() const { return static_cast<int64_t>(threshold.size()); }
};

// What TensorRT tells of the tensors: at build time with -1 for what it does not know.
std::vector<PluginTensorDesc> input_descs(const Images& images, DataType type) {
    return {
        desc(type, dims({images.batch, images.num_tokens, images.dim})),
        desc(type, dims({images.batch, images.num_tokens, images.compared()})),
        desc(kFloat, dims({images.batch, images.num_tokens})),
        desc(kFloat, dims({images.thresholds()})),
    };
}

std::vector<PluginTensorDesc> output_descs(const Images& images, DataType type, int32_t count, int64_t slots) {
    std::vector<PluginTensorDesc> all = {
        desc(type, dims({images.batch, slots, images.dim})),
        desc(kFloat, dims({images.batch, slots})),
        desc(DataType::kINT64, dims({images.batch, slots})),
        desc(DataType::kINT64, dims({images.batch, images.num_tokens})),
        desc(DataType::kINT32, dims({})),
    };
    all.resize(count);
    return all;
}

std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& all) {
    std::vector<DynamicPluginTensorDesc> result;
    for (const PluginTensorDesc& one : all) {
        Dims unknown = one.dims;
        for (int32_t i = 0; i < unknown.nbDims; ++i) unknown.d[i] = -1;
        result.push_back(dynamic_desc(desc(one.type, unknown), one.dims));
    }
    return result;
}

class Context final : public nvinfer1::IPluginResourceContext {
public:
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

// A plugin that was built for the largest images, written into an engine, read again and attached.
class Engine {
public:
    Engine(const Fields& fields, const Images& largest, DataType type) {
        const PluginPointer built = create(fields);
        if (!CHECK(built != nullptr)) return;
        nvinfer1::IPluginV3OneBuild& phase = build(*built);
        num_outputs = phase.getNbOutputs();
        const auto in = dynamic(input_descs(largest, type));
        const auto out = dynamic(output_descs(largest, type, num_outputs, largest.num_tokens));
        if (!CHECK_EQUAL(phase.configurePlugin(in.data(), 4, out.data(), num_outputs), 0)) return;
        workspace_bytes = phase.getWorkspaceSize(in.data(), 4, out.data(), num_outputs);
        const PluginPointer read = create(runtime(*built).getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
        if (!CHECK(read != nullptr)) return;
        plugin.reset(runtime(*read).attachToContext(&context));
        CHECK(plugin != nullptr);
    }

    Context context;
    PluginPointer plugin;
    int32_t num_outputs = 0;
    size_t workspace_bytes = 0;
};

// Buffers of one call, made for K = N as TensorRT makes them for the size tensor's bound.
class Call {
public:
    Call(Engine& engine, const Images& images, DataType type, int64_t slots)
        : tokens(images.tokens.size() * size_of(type)),
          features(images.features.size() * size_of(type)),
          log_size(images.log_size.size() * 4),
          threshold(images.threshold.size() * 4),
          kept_tokens(images.batch * slots * images.dim * size_of(type)),
          kept_log_size(images.batch * slots * 4),
          kept_index(images.batch * slots * 8),
          assignment(images.batch * images.num_tokens * 8),
          num_kept(4),
          workspace(engine.workspace_bytes),
          in(input_descs(images, type)),
          out(output_descs(images, type, engine.num_outputs, slots)) {
        put_tokens(tokens, images.tokens, type);
        put_tokens(features, images.features, type);
        log_size.put(images.log_size.data(), images.log_size.size() * 4);
        threshold.put(images.threshold.data(), images.threshold.size() * 4);
        inputs = {
            tokens.get(), images.feature_dim > 0 ? features.get() : tokens.get(), log_size.get(), threshold.get()};
        outputs = {kept_tokens.get(), kept_log_size.get(), kept_index.get(), assignment.get()};
        if (engine.num_outputs > 4) outputs.push_back(num_kept.get());
    }

    // Another number of images (0) or tokens (1) than there is memory for
    void counts(int32_t axis, int64_t size) {
        for (int32_t input = 0; input < 3; ++input) in[input].dims.d[axis] = size;
    }

    int32_t on_shape_change(Engine& engine) {
        return runtime(*engine.plugin).onShapeChange(in.data(), 4, out.data(), static_cast<int32_t>(out.size()));
    }

    int32_t enqueue(Engine& engine) {
        // Nothing promises that the workspace is aligned
        auto* misaligned = static_cast<uint8_t*>(workspace.get()) + 8;
        return runtime(*engine.plugin)
            .enqueue(in.data(), out.data(), inputs.data(), outputs.data(), misaligned, nullptr);
    }

    bool walls_stand() const {
        for (const Memory* memory :
             {&tokens, &features, &log_size, &threshold, &kept_tokens, &kept_log_size, &kept_index, &assignment,
              &num_kept, &workspace}) {
            if (!memory->wall_stands()) return false;
        }
        return true;
    }

    bool outputs_untouched() const {
        return kept_tokens.untouched() && kept_log_size.untouched() && kept_index.untouched() &&
               assignment.untouched() && num_kept.untouched();
    }

    Memory tokens, features, log_size, threshold, kept_tokens, kept_log_size, kept_index, assignment, num_kept,
        workspace;
    std::vector<PluginTensorDesc> in, out;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
};

// One prefix token and four patches in two dimensions: two alike along x, two alike along y.
Images two_pairs() {
    return {1, 5, 2, {5, 6, 1, 0, 2, 0, 0, 1, 0, 3}, {0, 0, 0, 0, 0}, {0.9f}};
}

struct Expected {
    int32_t slots;
    std::vector<float> tokens, sizes;  // a size of 0 is padding
    std::vector<int64_t> index, assignment;
};

void check_results(const Call& call, const Images& images, const Expected& expected, DataType type, bool dynamic) {
    if (dynamic) CHECK_EQUAL(call.num_kept.at<int32_t>(0), expected.slots);
    for (size_t i = 0; i < expected.tokens.size(); ++i) {
        CHECK_EQUAL(token_at(call.kept_tokens, i, type), expected.tokens[i]);
    }
    for (size_t i = 0; i < expected.sizes.size(); ++i) {
        const float log_size = expected.sizes[i] > 0 ? std::log(expected.sizes[i]) : kPad;
        CHECK(std::fabs(call.kept_log_size.at<float>(i) - log_size) <= 1e-6f);
        CHECK_EQUAL(call.kept_index.at<int64_t>(i), expected.index[i]);
    }
    for (size_t i = 0; i < expected.assignment.size(); ++i) {
        CHECK_EQUAL(call.assignment.at<int64_t>(i), expected.assignment[i]);
    }
    CHECK_EQUAL(expected.tokens.size(), static_cast<size_t>(images.batch * expected.slots * images.dim));
    CHECK_EQUAL(expected.sizes.size(), static_cast<size_t>(images.batch * expected.slots));
    CHECK(call.walls_stand());
}

void run(
    const Fields& fields, const Images& largest, const Images& images, const Expected& expected, DataType type,
    bool dynamic = true) {
    Engine engine(fields, largest, type);
    if (engine.plugin == nullptr) return;
    Call call(engine, images, type, dynamic ? images.num_tokens : expected.slots);
    CHECK_EQUAL(runtime(*engine.plugin).setTactic(0), 0);
    // The number of slots is not known when the shapes change
    if (dynamic) call.out[0].dims.d[1] = call.out[1].dims.d[1] = call.out[2].dims.d[1] = -1;
    CHECK_EQUAL(call.on_shape_change(engine), 0);
    if (CHECK_EQUAL(call.enqueue(engine), 0)) check_results(call, images, expected, type, dynamic);
    CHECK_EQUAL(logged(), "");
}

Fields one_prefix() {
    return Fields().add("num_prefix_tokens", 1);
}

void exact_examples() {
    for (const DataType type : {kFloat, DataType::kHALF, DataType::kBF16}) {
        const Images pairs = two_pairs();
        run(one_prefix(), pairs, pairs, {3, {5, 6, 1.5f, 0, 0, 2}, {1, 2, 2}, {0, 2, 4}, {0, 1, 1, 2, 2}}, type);
        run(one_prefix().add("reduction", "drop"), pairs, pairs,
            {3, {5, 6, 2, 0, 0, 3}, {1, 2, 2}, {0, 2, 4}, {0, 1, 1, 2, 2}}, type);
        run(one_prefix().add("multiple_of", 4), pairs, pairs,
            {4, {5, 6, 1.5f, 0, 0, 2, 0, 0}, {1, 2, 2, 0}, {0, 2, 4, 0}, {0, 1, 1, 2, 2}}, type);
        Images nothing_alike = pairs;
        nothing_alike.threshold = {1.5f};
        run(one_prefix(), pairs, nothing_alike, {5, pairs.tokens, {1, 1, 1, 1, 1}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}},
            type);
        // With a capacity as many go as it says, whatever the threshold; the first of those that are equally alike
        run(one_prefix().add("capacity", 2), pairs, nothing_alike,
            {3, {5, 6, 1.5f, 0, 0, 2}, {1, 2, 2}, {0, 2, 4}, {0, 1, 1, 2, 2}}, type, false);
        run(one_prefix().add("capacity", 3), pairs, pairs,
            {4, {5, 6, 1.5f, 0, 0, 1, 0, 3}, {1, 2, 1, 1}, {0, 2, 3, 4}, {0, 1, 1, 2, 3}}, type, false);
        // Mean similarity to the others is 1/3 for all, so all but the first go
        Images scores = pairs;
        scores.threshold = {0.25f};
        run(one_prefix().add("selection", "redundancy"), pairs, scores,
            {2, {5, 6, 0.75f, 1}, {1, 4}, {0, 1}, {0, 1, 1, 1, 1}}, type);
        run(one_prefix().add("selection", "redundancy").add("capacity", 1), pairs, scores,
            {2, {5, 6, 0.75f, 1}, {1, 4}, {0, 4}, {0, 1, 1, 1, 1}}, type, false);
        // Features that find the first patch like the last one, and the third like the second
        Images crossed = pairs;
        crossed.feature_dim = 3;
        crossed.features = {1, 2, 3, 1, 0, 0, 0, 1, 0, 0, 2, 0, 3, 0, 0};
        run(one_prefix(), crossed, crossed, {3, {5, 6, 1, 0.5f, 0.5f, 1.5f}, {1, 2, 2}, {0, 2, 4}, {0, 2, 1, 1, 2}},
            type);
        // In one dimension all are alike
        Images one_wide = pairs;
        one_wide.feature_dim = 1;
        one_wide.features = {9, 1, 2, 3, 4};
        run(one_prefix().add("reduction", "drop"), one_wide, one_wide,
            {3, {5, 6, 2, 0, 0, 3}, {1, 3, 1}, {0, 2, 4}, {0, 1, 1, 1, 2}}, type);
        // A NaN prunes nothing
        Images not_a_number = pairs;
        not_a_number.threshold = {std::numeric_limits<float>::quiet_NaN()};
        run(one_prefix(), pairs, not_a_number, {5, pairs.tokens, {1, 1, 1, 1, 1}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}},
            type);
    }
}

// Two images with the same pair, which one threshold folds and the other does not; one image with
// padding; in an engine for three images of more tokens.
void batches() {
    Images two{2, 4, 2, {7, 7, 1, 0, 4, 0, 0, 2, 7, 7, 1, 0, 4, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0, kPad}, {0.5f, 2.0f}};
    const Images largest{3, 9, 2, std::vector<float>(54), std::vector<float>(27), {0, 0, 0}};
    for (const DataType type : {kFloat, DataType::kHALF, DataType::kBF16}) {
        run(one_prefix(), largest, two,
            {3,
             {7, 7, 2.5f, 0, 0, 2, 7, 7, 1, 0, 4, 0},
             {1, 2, 1, 1, 1, 1},
             {0, 2, 3, 0, 1, 2},
             {0, 1, 1, 2, 0, 1, 2, -1}},
            type);
    }
}

// Without prefix tokens, with nothing but padding: no slots at all.
void nothing_left() {
    Images padding{1, 2, 2, {1, 2, 3, 4}, {kPad, kPad}, {0.5f}};
    run(Fields().add("num_prefix_tokens", 0), padding, padding, {0, {}, {}, {}, {-1, -1}}, kFloat);
}

// One plugin, call after call with other shapes, as an execution context makes them.
void calls_one_after_another() {
    const Images largest{3, 9, 2, std::vector<float>(54), std::vector<float>(27), {0, 0, 0}};
    Engine engine(one_prefix().add("max_tokens", 9).add("opt_tokens", 5), largest, kFloat);
    if (engine.plugin == nullptr) return;
    const Images pairs = two_pairs();
    Images smaller{1, 3, 2, {5, 6, 1, 0, 2, 0}, {0, 0, 0}, {0.9f}};
    for (int round = 0; round < 3; ++round) {
        Call first(engine, pairs, kFloat, 5);
        CHECK_EQUAL(first.on_shape_change(engine), 0);
        CHECK_EQUAL(first.enqueue(engine), 0);
        check_results(first, pairs, {3, {5, 6, 1.5f, 0, 0, 2}, {1, 2, 2}, {0, 2, 4}, {0, 1, 1, 2, 2}}, kFloat, true);
        Call second(engine, smaller, kFloat, 3);
        CHECK_EQUAL(second.enqueue(engine), 0);
        check_results(second, smaller, {2, {5, 6, 1.5f, 0}, {1, 2}, {0, 2}, {0, 1, 1}}, kFloat, true);
    }
    CHECK_EQUAL(logged(), "");
}

// Calls that must be refused with a message, before anything is written.
void refused_calls() {
    const Images pairs = two_pairs();
    struct Case {
        const char* message;
        void (*spoil)(Call&);
        bool shape_change_refuses;
    };
    const Case cases[] = {
        {"a size is not known (-1)", [](Call& c) { c.counts(1, -1); }, false},
        {"a size is not known (-1)", [](Call& c) { c.counts(0, -1); }, false},
        {"features of width -1", [](Call& c) { c.in[1].dims.d[2] = -1; }, false},
        {"a size is not known (-1)", [](Call& c) { c.in[3].dims.d[0] = -1; }, false},
        {"features with [1, 4]", [](Call& c) { c.in[1].dims.d[1] = 4; }, true},
        {"log_size with [1, 4]", [](Call& c) { c.in[2].dims.d[1] = 4; }, true},
        {"6 tokens are more than max_tokens 5", [](Call& c) { c.counts(1, 6); }, true},
        {"leaves no patches among 1 tokens", [](Call& c) { c.counts(1, 1); }, true},
        {"2 thresholds for 1 images", [](Call& c) { c.in[3].dims.d[0] = 2; }, true},
        {"the batch is 0", [](Call& c) { c.counts(0, 0); }, true},
        {"tokens have a width of 0", [](Call& c) { c.in[0].dims.d[2] = 0; }, true},
        {"features have a width of 0", [](Call& c) { c.in[1].dims.d[2] = 0; }, true},
        {"tokens has 2 dimensions", [](Call& c) { c.in[0].dims.nbDims = 2; }, true},
        {"tokens has -1 dimensions", [](Call& c) { c.in[0].dims.nbDims = -1; }, true},
        {"features has 4 dimensions", [](Call& c) { c.in[1].dims.nbDims = 4; }, true},
        {"features are float16 and tokens float32", [](Call& c) { c.in[1].type = DataType::kHALF; }, true},
        {"log_size is float16", [](Call& c) { c.in[2].type = DataType::kHALF; }, true},
        {"tokens are int8", [](Call& c) { c.in[0].type = DataType::kINT8; }, true},
        {"the pointer to tokens is NULL", [](Call& c) { c.inputs[0] = nullptr; }, false},
        {"the pointer to features is NULL", [](Call& c) { c.inputs[1] = nullptr; }, false},
        {"the pointer to log_size is NULL", [](Call& c) { c.inputs[2] = nullptr; }, false},
        {"the pointer to threshold is NULL", [](Call& c) { c.inputs[3] = nullptr; }, false},
        {"the pointer to kept_tokens is NULL", [](Call& c) { c.outputs[0] = nullptr; }, false},
        {"the pointer to assignment is NULL", [](Call& c) { c.outputs[3] = nullptr; }, false},
        {"without an address for the size tensor", [](Call& c) { c.outputs[4] = nullptr; }, false},
        {"is not aligned", [](Call& c) { c.outputs[2] = static_cast<char*>(c.outputs[2]) + 4; }, false},
    };
    for (const Case& one : cases) {
        Engine engine(one_prefix().add("opt_tokens", 5).add("max_tokens", 5), pairs, kFloat);
        if (engine.plugin == nullptr) return;
        Call call(engine, pairs, kFloat, 5);
        one.spoil(call);
        CHECK_EQUAL(call.on_shape_change(engine) != 0, one.shape_change_refuses);
        if (one.shape_change_refuses) CHECK_CONTAINS(logged(), one.message);
        CHECK(call.enqueue(engine) != 0);
        CHECK_CONTAINS(logged(), one.message);
        CHECK(call.outputs_untouched());
    }
    Engine engine(one_prefix(), pairs, kFloat);
    Call call(engine, pairs, kFloat, 5);
    CHECK(
        runtime(*engine.plugin)
            .enqueue(call.in.data(), call.out.data(), nullptr, call.outputs.data(), call.workspace.get(), nullptr) !=
        0);
    CHECK_CONTAINS(logged(), "without descriptions or addresses");
    CHECK(runtime(*engine.plugin).onShapeChange(call.in.data(), 3, call.out.data(), 5) != 0);
    CHECK_CONTAINS(logged(), "3 inputs: the plugin has 4");
    // A fixed capacity needs as many patches
    Engine fixed(one_prefix().add("capacity", 4), pairs, kFloat);
    Images fewer{1, 4, 2, {5, 6, 1, 0, 2, 0, 0, 1}, {0, 0, 0, 0}, {0.9f}};
    Call small(fixed, fewer, kFloat, 5);
    CHECK(small.on_shape_change(fixed) != 0);
    CHECK(small.enqueue(fixed) != 0);
    CHECK_CONTAINS(logged(), "capacity 4 is more than the 3 patches of 4 tokens");
    CHECK(small.outputs_untouched());
    // and so many that pairs can leave as few
    Engine tight(one_prefix().add("capacity", 2), pairs, kFloat);
    const Images more{1, 7, 1, std::vector<float>(7), std::vector<float>(7), {0.9f}};
    Call large(tight, more, kFloat, 3);
    CHECK(large.on_shape_change(tight) != 0);
    CHECK(large.enqueue(tight) != 0);
    CHECK_CONTAINS(logged(), "capacity 2 is fewer than the 3 patches that selection \"pairs\" keeps of 6");
    CHECK(large.outputs_untouched());
}

// The build phase: what the profile's largest shapes may be, and the workspace for them.
void configuration() {
    const struct {
        Fields fields;
        int64_t batch, tokens, dim, thresholds;
        const char* message;  // null where it is taken
    } cases[] = {
        {one_prefix(), 64, 577, 768, 64, nullptr},
        {one_prefix(), 64, 577, 768, 1, nullptr},
        {one_prefix(), 1, 4097, 64, 1, nullptr},
        {one_prefix(), 1, 4098, 64, 1, "4097 patches are more than the 4096"},
        {one_prefix(), 1, 1, 64, 1, "leaves no patches among 1 tokens"},
        {one_prefix().add("max_tokens", 197), 1, 577, 64, 1, "577 tokens are more than max_tokens 197"},
        {one_prefix().add("capacity", 200), 1, 197, 64, 1, "capacity 200 is more than the 196 patches"},
        {one_prefix().add("capacity", 97), 1, 197, 64, 1, "capacity 97 is fewer than the 98 patches"},
        {one_prefix(), 4, 197, 64, 3, "3 thresholds for 4 images"},
        {one_prefix(), 0, 197, 64, 1, "the batch is 0"},
    };
    for (const auto& one : cases) {
        const PluginPointer plugin = create(one.fields);
        const Images largest{one.batch, one.tokens, one.dim, {}, {}, std::vector<float>(one.thresholds), 48};
        const int32_t outputs = build(*plugin).getNbOutputs();
        const auto in = dynamic(input_descs(largest, DataType::kHALF));
        const auto out = dynamic(output_descs(largest, DataType::kHALF, outputs, largest.num_tokens));
        logged();
        CHECK_EQUAL(build(*plugin).configurePlugin(in.data(), 4, out.data(), outputs) == 0, one.message == nullptr);
        const std::string of_configure = logged();
        const size_t bytes = build(*plugin).getWorkspaceSize(in.data(), 4, out.data(), outputs);
        CHECK_EQUAL(bytes > 0, one.message == nullptr);
        if (one.message != nullptr) {
            CHECK_CONTAINS(of_configure, one.message);
            CHECK_CONTAINS(logged(), one.message);
        } else {
            CHECK_EQUAL(of_configure + logged(), "");
            simprune_problem problem{one.batch, one.tokens,       one.dim, 48, one.thresholds, 0, 1,
                                     1,         SIMPRUNE_FLOAT16, 0,       0};
            CHECK_EQUAL(bytes, simprune_workspace_bytes(&problem) + 256);
        }
    }
    // What the network fixes is looked at too, not only the profile
    const PluginPointer plugin = create(one_prefix());
    const Images images = two_pairs();
    auto in = dynamic(input_descs(images, kFloat));
    const auto out = dynamic(output_descs(images, kFloat, 5, 5));
    in[0].desc.dims.d[2] = 0;
    CHECK(build(*plugin).configurePlugin(in.data(), 4, out.data(), 5) != 0);
    CHECK_CONTAINS(logged(), "tokens have a width of 0");
    for (const auto& [input, message] :
         {std::pair{1, "features are float16 and tokens float32"}, std::pair{2, "log_size is float16"}}) {
        in = dynamic(input_descs(images, kFloat));
        in[input].desc.type = DataType::kHALF;
        CHECK(build(*plugin).configurePlugin(in.data(), 4, out.data(), 5) != 0);
        CHECK_CONTAINS(logged(), message);
        CHECK_EQUAL(build(*plugin).getWorkspaceSize(in.data(), 4, out.data(), 5), 0u);
        CHECK_CONTAINS(logged(), message);
    }
    CHECK(build(*plugin).configurePlugin(in.data(), 4, out.data(), 4) != 0);
    CHECK_CONTAINS(logged(), "4 outputs: with capacity 0 the plugin has 5");
}

}  // namespace

int main() {
    setLoggerFinder(loggers::tensorrt10_finder());
    exact_examples();
    batches();
    nothing_left();
    calls_one_after_another();
    refused_calls();
    configuration();
    return check::result();
}
