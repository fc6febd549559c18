// getOutputShapes, for one prune layer and for layers that follow one another.
#include "check.h"
#include "plugin_library.h"

#include <NvInferImpl.h>

#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <stdexcept>

using namespace plugin_library;
using nvinfer1::DimensionOperation;
using nvinfer1::DimsExprs;
using nvinfer1::IDimensionExpr;

namespace {

// A size as the builder sees it: a number, a name, or the result of an operation; and the text of it.
class Size final : public IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
public:
    explicit Size(int64_t value) : text(std::to_string(value)), value_(value), constant_(true) { mImpl = this; }
    explicit Size(const std::string& name) : text(name) { mImpl = this; }

    std::string text;
    bool size_tensor = false, depends_on_size_tensor = false;

private:
    bool isConstant() const override { return constant_; }
    int64_t getConstantValue() const override { return constant_ ? value_ : std::numeric_limits<int64_t>::min(); }
    bool isSizeTensor() const override { return size_tensor; }

    int64_t value_ = 0;
    bool constant_ = false;
};

const Size& as_size(const IDimensionExpr& expression) {
    return static_cast<const Size&>(expression);
}

struct Declared {
    int32_t output;
    std::string opt, upper;
};

class Builder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
public:
    Builder() { mImpl = this; }

    const IDimensionExpr* named(const std::string& name) { return &sizes_.emplace_back(name); }
    const IDimensionExpr* number(int64_t value) { return &sizes_.emplace_back(value); }

    std::vector<Declared> declared;
    bool throws = false;
    int left = 1000;

private:
    // Null in place of all that comes after `left` expressions
    bool made() { return --left >= 0; }
    const IDimensionExpr* constant(int64_t value) override { return made() ? number(value) : nullptr; }
    const IDimensionExpr* operation(
        DimensionOperation operation, const IDimensionExpr& first, const IDimensionExpr& second) override {
        if (!made()) return nullptr;
        static const std::map<DimensionOperation, std::string> names = {
            {DimensionOperation::kSUB, "sub"},
            {DimensionOperation::kMIN, "min"},
            {DimensionOperation::kFLOOR_DIV, "div"}};
        const Size &a = as_size(first), &b = as_size(second);
        Size& result = sizes_.emplace_back(names.at(operation) + "(" + a.text + ", " + b.text + ")");
        result.depends_on_size_tensor = a.depends_on_size_tensor || b.depends_on_size_tensor;
        return &result;
    }
    const IDimensionExpr* declareSizeTensor(
        int32_t output, const IDimensionExpr& opt, const IDimensionExpr& upper) override {
        if (throws) throw std::runtime_error("no more expressions");
        if (!made()) return nullptr;
        // The rule of TensorRT's header, and the stricter one that this plugin keeps for the bound
        CHECK(!as_size(opt).depends_on_size_tensor);
        CHECK(!as_size(upper).depends_on_size_tensor);
        declared.push_back({output, as_size(opt).text, as_size(upper).text});
        Size& result = sizes_.emplace_back("K" + std::to_string(declared.size()));
        result.size_tensor = result.depends_on_size_tensor = true;
        return &result;
    }

    std::deque<Size> sizes_;
};

using Sizes = std::vector<const IDimensionExpr*>;

DimsExprs dims_of(const Sizes& sizes) {
    DimsExprs result{};
    result.nbDims = static_cast<int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), result.d);
    return result;
}

std::string text_of(const DimsExprs& dims) {
    std::string text;
    for (int32_t i = 0; i < dims.nbDims; ++i) text += (i > 0 ? ", " : "") + as_size(*dims.d[i]).text;
    return "[" + text + "]";
}

Fields fields(int32_t capacity, int32_t opt = 0, int32_t max = 0, int32_t prefix = 1) {
    return Fields()
        .add("num_prefix_tokens", prefix)
        .add("capacity", capacity)
        .add("opt_tokens", opt)
        .add("max_tokens", max);
}

struct Shapes {
    bool taken = false;
    std::vector<DimsExprs> outputs;
    std::string message;
};

Shapes output_shapes(const Fields& fields, std::vector<DimsExprs> inputs, Builder& builder, int extra_outputs = 0) {
    Shapes result;
    const PluginPointer plugin = create(fields);
    if (!CHECK(plugin != nullptr)) return result;
    nvinfer1::IPluginV3OneBuild& phase = build(*plugin);
    result.outputs.resize(phase.getNbOutputs() + extra_outputs);
    for (DimsExprs& output : result.outputs) output.nbDims = -1;
    logged();
    result.taken = phase.getOutputShapes(
                       inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, result.outputs.data(),
                       static_cast<int32_t>(result.outputs.size()), builder) == 0;
    result.message = logged();
    if (result.taken) CHECK_EQUAL(result.message, "");
    return result;
}

// Inputs for tokens [batch, tokens, width] that are compared themselves
std::vector<DimsExprs> inputs_of(
    const IDimensionExpr* batch, const IDimensionExpr* tokens, const IDimensionExpr* width,
    const IDimensionExpr* thresholds) {
    const DimsExprs compared = dims_of({batch, tokens, width});
    return {compared, compared, dims_of({batch, tokens}), dims_of({thresholds})};
}

void one_dynamic_layer() {
    Builder builder;
    auto inputs = inputs_of(builder.named("B"), builder.number(197), builder.number(384), builder.number(1));
    inputs[1] = dims_of({inputs[0].d[0], inputs[0].d[1], builder.number(64)});
    const Shapes shapes = output_shapes(fields(0), inputs, builder);
    if (!CHECK(shapes.taken)) return;
    CHECK_EQUAL(shapes.outputs.size(), 5u);
    CHECK_EQUAL(text_of(shapes.outputs[0]), "[B, K1, 384]");
    CHECK_EQUAL(text_of(shapes.outputs[1]), "[B, K1]");
    CHECK_EQUAL(text_of(shapes.outputs[2]), "[B, K1]");
    CHECK_EQUAL(text_of(shapes.outputs[3]), "[B, 197]");
    CHECK_EQUAL(text_of(shapes.outputs[4]), "[]");
    CHECK_EQUAL(builder.declared.size(), 1u);
    CHECK_EQUAL(builder.declared[0].output, 4);
}

// The size tensor's tuning value and bound, for every combination of what is known.
void hints() {
    const struct {
        const char *tokens, *selection;
        int32_t opt, max;
        const char *usual, *upper;
        int32_t multiple_of = 1;
    } cases[] = {
        // Without a hint midway between what a selection keeps at least and everything
        {"197", "pairs", 0, 0, "148", "197"},
        {"197", "redundancy", 0, 0, "99", "197"},
        {"2", "pairs", 0, 0, "2", "2"},
        {"6", "redundancy", 0, 0, "4", "6"},
        {"197", "pairs", 120, 0, "120", "197"},
        {"197", "pairs", 0, 197, "148", "197"},
        {"197", "redundancy", 120, 577, "120", "197"},
        {"197", "pairs", 300, 577, "197", "197"},
        {"N", "pairs", 0, 0, "sub(N, div(sub(N, 1), 4))", "N"},
        {"N", "redundancy", 0, 0, "sub(N, div(sub(N, 1), 2))", "N"},
        {"N", "pairs", 120, 0, "min(120, N)", "N"},
        {"N", "pairs", 0, 577, "sub(N, div(sub(N, 1), 4))", "577"},
        {"N", "pairs", 120, 577, "120", "577"},
        // Rounded as K is
        {"197", "pairs", 0, 0, "152", "197", 8},
        {"197", "pairs", 121, 0, "128", "197", 8},
        {"197", "pairs", 193, 0, "197", "197", 8},
        {"197", "pairs", 0, 0, "197", "197", 2147483647},
        {"N", "pairs", 121, 0, "min(128, N)", "N", 8},
        {"N", "pairs", 577, 577, "577", "577", 8},
    };
    for (const auto& one : cases) {
        Builder builder;
        const std::string name = one.tokens;
        const auto* tokens = name == "N" ? builder.named(name) : builder.number(std::stoll(name));
        const auto inputs = inputs_of(builder.named("B"), tokens, builder.number(384), builder.named("T"));
        Fields given = fields(0, one.opt, one.max);
        given.add("selection", one.selection).add("multiple_of", one.multiple_of);
        const Shapes shapes = output_shapes(given, inputs, builder);
        if (!CHECK(shapes.taken) || !CHECK_EQUAL(builder.declared.size(), 1u)) continue;
        CHECK_EQUAL(builder.declared[0].opt, one.usual);
        CHECK_EQUAL(builder.declared[0].upper, one.upper);
    }
}

void fixed_capacity() {
    Builder builder;
    const auto inputs = inputs_of(builder.number(8), builder.number(197), builder.number(384), builder.number(8));
    // The hints are of no use here, so they may be anything
    const Shapes shapes = output_shapes(fields(98, 20, 30), inputs, builder);
    if (!CHECK(shapes.taken)) return;
    CHECK_EQUAL(shapes.outputs.size(), 4u);
    CHECK_EQUAL(text_of(shapes.outputs[0]), "[8, 99, 384]");
    CHECK_EQUAL(text_of(shapes.outputs[1]), "[8, 99]");
    CHECK_EQUAL(text_of(shapes.outputs[2]), "[8, 99]");
    CHECK_EQUAL(text_of(shapes.outputs[3]), "[8, 197]");
    CHECK(builder.declared.empty());
    for (const DimsExprs& output : shapes.outputs) {
        for (int32_t i = 0; i < output.nbDims; ++i) CHECK(output.d[i]->isConstant());
    }
}

// Three layers, each fed with what the layer before it gave. A capacity of 0 is dynamic.
void chain(const std::vector<int32_t>& capacities, int32_t opt, int32_t max, const std::vector<std::string>& expected) {
    Builder builder;
    const auto* batch = builder.named("B");
    auto inputs = inputs_of(batch, builder.number(197), builder.number(768), batch);
    for (size_t layer = 0; layer < capacities.size(); ++layer) {
        const Shapes shapes = output_shapes(fields(capacities[layer], opt, max), inputs, builder);
        if (!CHECK(shapes.taken)) {
            std::cerr << shapes.message;
            return;
        }
        CHECK_EQUAL(text_of(shapes.outputs[0]), "[B, " + expected[layer] + ", 768]");
        CHECK_EQUAL(text_of(shapes.outputs[3]), "[B, " + as_size(*inputs[0].d[1]).text + "]");
        inputs[0] = inputs[1] = shapes.outputs[0];
        inputs[2] = shapes.outputs[1];
    }
}

void chains() {
    chain({0, 0, 0}, 120, 197, {"K1", "K2", "K3"});
    chain({98, 49, 24}, 0, 0, {"99", "50", "25"});
    chain({98, 49, 24}, 120, 197, {"99", "50", "25"});
    chain({0, 49, 0}, 40, 197, {"K1", "50", "K2"});
    chain({98, 0, 0}, 60, 197, {"99", "K1", "K2"});
}

void hints_missing_in_a_chain() {
    const struct { int32_t opt, max; } cases[] = {{0, 0}, {120, 0}, {0, 197}};
    for (const auto& one : cases) {
        Builder builder;
        const auto* batch = builder.named("B");
        auto inputs = inputs_of(batch, builder.number(197), builder.number(768), batch);
        const Shapes first = output_shapes(fields(0, one.opt, one.max), inputs, builder);
        if (!CHECK(first.taken)) continue;
        inputs[0] = inputs[1] = first.outputs[0];
        inputs[2] = first.outputs[1];
        const Shapes second = output_shapes(fields(0, one.opt, one.max), inputs, builder);
        CHECK(!second.taken);
        CHECK_CONTAINS(
            second.message,
            "opt_tokens " + std::to_string(one.opt) + " and max_tokens " + std::to_string(one.max) + " of a layer");
        CHECK_EQUAL(builder.declared.size(), 1u);
    }
}

void refusals() {
    Builder b;
    const auto *B = b.named("B"), *N = b.named("N"), *D = b.named("D"), *T = b.named("T"), *one = b.number(1);
    const auto n = [&](int64_t value) { return b.number(value); };
    const DimsExprs X = dims_of({B, N, D}), L = dims_of({B, N});
    const struct {
        std::vector<DimsExprs> inputs;
        Fields fields;
        const char* message;
    } cases[] = {
        {{dims_of({B, N}), X, L, dims_of({one})}, fields(0), "tokens has 2 dimensions: it must have 3"},
        {{X, dims_of({B, N}), L, dims_of({one})}, fields(0), "features has 2 dimensions: it must have 3"},
        {{X, dims_of({B, N, n(6), n(64)}), L, dims_of({one})}, fields(0), "features has 4 dimensions"},
        {{X, X, dims_of({B, N, one}), dims_of({one})}, fields(0), "log_size has 3 dimensions"},
        {{X, X, L, dims_of({})}, fields(0), "threshold has 0 dimensions"},
        {{X, X, L, dims_of({one, one})}, fields(0), "threshold has 2 dimensions"},
        {{X, X}, fields(0), "2 inputs: the plugin has 4, tokens, features, log_size and threshold"},
        {{X, L, dims_of({one})},
         fields(0),
         "3 inputs: the plugin has 4, tokens, features, log_size and threshold; "
         "the file is from before version 2 of this operator: export the model"},
        {{dims_of({n(2), N, D}), X, dims_of({n(3), N}), dims_of({one})},
         fields(0),
         "tokens begin with sizes [2, -1] and log_size with [3, -1] (-1: any): give as many images and tokens in both"},
        {{dims_of({B, n(5), D}), X, dims_of({B, n(6)}), dims_of({one})},
         fields(0),
         "tokens begin with sizes [-1, 5] and log_size with [-1, 6]"},
        {{dims_of({B, n(5), D}), dims_of({B, n(6), D}), L, dims_of({one})},
         fields(0),
         "tokens begin with sizes [-1, 5] and features with [-1, 6]"},
        {{X, dims_of({n(2), N, D}), dims_of({n(1), N}), dims_of({one})},
         fields(0),
         "features begin with sizes [2, -1] and log_size with [1, -1]"},
        {{X, dims_of({B, N, n(0)}), L, dims_of({one})}, fields(0), "features have a width of 0: give at least 1"},
        {inputs_of(n(0), N, D, T), fields(0), "the batch is 0"},
        {inputs_of(B, N, n(0), T), fields(0), "tokens have a width of 0: give at least 1"},
        {inputs_of(n(4), N, D, n(3)), fields(0), "3 thresholds for 4 images"},
        {inputs_of(B, N, D, n(0)), fields(0), "0 thresholds for -1 images"},
        {inputs_of(B, n(0), D, T), fields(0, 0, 0, 0), "num_prefix_tokens 0 leaves no patches among 0 tokens"},
        {inputs_of(B, n(1), D, T), fields(0), "num_prefix_tokens 1 leaves no patches among 1 tokens"},
        {inputs_of(B, n(4), D, T), fields(0, 0, 0, 5), "num_prefix_tokens 5 leaves no patches among 4 tokens"},
        // Known from one of the inputs only
        {{X, X, dims_of({B, n(1)}), dims_of({one})}, fields(0), "leaves no patches among 1 tokens"},
        {{X, dims_of({B, n(1), D}), L, dims_of({one})}, fields(0), "leaves no patches among 1 tokens"},
        {{X, dims_of({n(0), N, D}), L, dims_of({one})}, fields(0), "the batch is 0"},
        {inputs_of(B, n(4098), D, T), fields(0), "4097 patches are more than the 4096"},
        {inputs_of(B, n(197), D, T), fields(197), "capacity 197 is more than the 196 patches of 197 tokens"},
        {inputs_of(B, n(197), D, T), fields(97),
         "capacity 97 is fewer than the 98 patches that selection \"pairs\" keeps of 196: give 98 at least"},
        {inputs_of(B, n(198), D, T), fields(97), "capacity 97 is fewer than the 98 patches"},
        {inputs_of(B, n(197), D, T), fields(0, 0, 196), "197 tokens are more than max_tokens 196"},
    };
    for (const auto& c : cases) {
        const Shapes shapes = output_shapes(c.fields, c.inputs, b);
        CHECK(!shapes.taken);
        CHECK_CONTAINS(shapes.message, c.message);
        CHECK_EQUAL(std::count(shapes.message.begin(), shapes.message.end(), '\n'), 1);
    }
    const Shapes outputs = output_shapes(fields(0), inputs_of(B, N, D, T), b, 1);
    CHECK(!outputs.taken);
    CHECK_CONTAINS(outputs.message, "6 outputs: with capacity 0 the plugin has 5");
    CHECK(b.declared.empty());
}

void largest_and_smallest() {
    Builder b;
    const auto *B = b.named("B"), *D = b.number(1), *T = b.named("T");
    CHECK(output_shapes(fields(0), inputs_of(B, b.number(4097), D, T), b).taken);
    CHECK(output_shapes(fields(4096), inputs_of(B, b.number(4097), D, T), b).taken);
    CHECK(output_shapes(fields(0, 0, 0, 0), inputs_of(B, b.number(1), D, T), b).taken);
    CHECK(output_shapes(fields(196), inputs_of(B, b.number(197), D, T), b).taken);
    // What pairs keep at least; redundancy may keep a single patch
    for (const int64_t tokens : {197, 198}) {
        CHECK(output_shapes(fields(98), inputs_of(B, b.number(tokens), D, T), b).taken);
        Fields one = fields(1);
        one.add("selection", "redundancy");
        CHECK(output_shapes(one, inputs_of(B, b.number(tokens), D, T), b).taken);
    }
    // Features of any width
    for (const int64_t width : {1, 63, 100000}) {
        auto inputs = inputs_of(B, b.number(197), b.number(384), T);
        inputs[1] = dims_of({B, b.number(197), b.number(width)});
        CHECK(output_shapes(fields(0), inputs, b).taken);
    }
    CHECK(output_shapes(fields(0, 0, 197), inputs_of(B, b.number(197), D, T), b).taken);
    // One threshold for any number of images, and any number of thresholds for any number of images
    CHECK(output_shapes(fields(0), inputs_of(b.number(4), b.number(5), D, b.number(1)), b).taken);
    CHECK(output_shapes(fields(0), inputs_of(B, b.number(5), D, b.number(3)), b).taken);
}

// Null from any function, an exception from the only one that is not noexcept
void builders_that_fail() {
    for (const int32_t capacity : {0, 10}) {
        for (const int32_t opt : {0, 30}) {
            for (const int32_t max : {0, 30}) {
                for (int left = 0;; ++left) {
                    Builder builder;
                    const auto inputs =
                        inputs_of(builder.named("B"), builder.named("N"), builder.named("D"), builder.named("T"));
                    builder.left = left;
                    const Shapes shapes = output_shapes(fields(capacity, opt, max), inputs, builder);
                    if (shapes.taken) {
                        CHECK(left > 0);
                        break;
                    }
                    if (!CHECK(left < 10)) break;
                    CHECK_CONTAINS(shapes.message, "TensorRT");
                    CHECK_EQUAL(std::count(shapes.message.begin(), shapes.message.end(), '\n'), 1);
                }
            }
        }
    }
    Builder builder;
    builder.throws = true;
    const auto inputs = inputs_of(builder.named("B"), builder.named("N"), builder.named("D"), builder.named("T"));
    const Shapes shapes = output_shapes(fields(0), inputs, builder);
    CHECK(!shapes.taken);
    CHECK_CONTAINS(shapes.message, "TensorRT's shape expressions threw an exception");
}

}  // namespace

int main() {
    setLoggerFinder(loggers::tensorrt10_finder());
    one_dynamic_layer();
    hints();
    fixed_capacity();
    chains();
    hints_missing_in_a_chain();
    refusals();
    largest_and_smallest();
    builders_that_fail();
    return check::result();
}
