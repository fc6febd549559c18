// SimilarityPrune as TensorRT sees it: an IPluginV3 and its creator.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "simprune.h"

namespace simprune {
namespace tensorrt {

struct Attributes {
    int32_t num_prefix_tokens = 0;
    int32_t selection = SIMPRUNE_PAIRS;
    int32_t reduction = SIMPRUNE_MERGE;
    int32_t capacity = 0;
    int32_t multiple_of = 1;
    int32_t opt_tokens = 0;
    int32_t max_tokens = 0;
};

constexpr int kNumFields = 7;

// Inputs, in the order of the node
enum Input { kTokens, kFeatures, kLogSize, kThreshold, kNumInputs };
// Outputs; the size tensor K is there only if K depends on the data (capacity 0)
enum Output { kKeptTokens, kKeptLogSize, kKeptIndex, kAssignment, kNumKept };

// Sizes of an input as far as they are known.
struct Shape {
    static constexpr int64_t kUnknown = -1;

    int32_t rank;
    int64_t d[nvinfer1::Dims::MAX_DIMS];
};

// Of all inputs
using Shapes = std::array<Shape, kNumInputs>;
using Types = std::array<nvinfer1::DataType, kNumInputs>;

class PrunePlugin final : public nvinfer1::IPluginV3,
                          public nvinfer1::IPluginV3OneCore,
                          public nvinfer1::IPluginV3OneBuild,
                          public nvinfer1::IPluginV3OneRuntime {
public:
    explicit PrunePlugin(const Attributes& attributes) noexcept;
    // The fields point into the object
    PrunePlugin(const PrunePlugin&) = delete;
    PrunePlugin& operator=(const PrunePlugin&) = delete;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(
        nvinfer1::DataType* output_types, int32_t num_outputs, const nvinfer1::DataType* input_types,
        int32_t num_inputs) const noexcept override;
    int32_t getOutputShapes(
        const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs* shape_inputs,
        int32_t num_shape_inputs, nvinfer1::DimsExprs* outputs, int32_t num_outputs,
        nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(
        int32_t position, const nvinfer1::DynamicPluginTensorDesc* in_out, int32_t num_inputs,
        int32_t num_outputs) noexcept override;
    int32_t configurePlugin(
        const nvinfer1::DynamicPluginTensorDesc* in, int32_t num_inputs, const nvinfer1::DynamicPluginTensorDesc* out,
        int32_t num_outputs) noexcept override;
    size_t getWorkspaceSize(
        const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
        const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t num_outputs) const noexcept override;
    const char* getTimingCacheID() noexcept override;
    const char* getMetadataString() noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(
        const nvinfer1::PluginTensorDesc* in, int32_t num_inputs, const nvinfer1::PluginTensorDesc* out,
        int32_t num_outputs) noexcept override;
    int32_t enqueue(
        const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc* output_descs,
        const void* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    bool takes_counts(int32_t num_inputs, int32_t num_outputs) const noexcept;
    bool takes_types(const Types& types) const noexcept;
    bool takes_shapes(const Shapes& shapes) const noexcept;
    bool takes_token_count(int64_t num_tokens) const noexcept;
    bool takes_whole_shapes(const Shapes& shapes) const noexcept;
    simprune_problem problem(const Shapes& shapes, nvinfer1::DataType type) const noexcept;
    const nvinfer1::IDimensionExpr* usual_slots(
        const nvinfer1::IDimensionExpr& num_tokens, const nvinfer1::IDimensionExpr& upper,
        nvinfer1::IExprBuilder& builder) const;
    const nvinfer1::IDimensionExpr* declare_slots(
        const nvinfer1::IDimensionExpr& num_tokens, nvinfer1::IExprBuilder& builder) const;

    const Attributes attributes_;
    std::array<char, 192> description_;
    std::array<nvinfer1::PluginField, kNumFields> fields_;
    nvinfer1::PluginFieldCollection field_collection_;
};

class PruneCreator : public nvinfer1::IPluginCreatorV3One {
public:
    PruneCreator() noexcept;

    nvinfer1::IPluginV3* createPlugin(
        const char* name, const nvinfer1::PluginFieldCollection* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

private:
    std::array<nvinfer1::PluginField, kNumFields> fields_;
    nvinfer1::PluginFieldCollection field_collection_;
};

// What files and engines from before version 2 ask for. It makes no plugin and says what to do. For
// processes that it stays in: those that link the library, or that it registers itself in.
class FormerCreator final : public PruneCreator {
public:
    nvinfer1::IPluginV3* createPlugin(
        const char* name, const nvinfer1::PluginFieldCollection* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    const char* getPluginVersion() const noexcept override;
};

}  // namespace tensorrt
}  // namespace simprune
