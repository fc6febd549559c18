// What TensorRT looks for in a plugin library.
#include "simprune.h"
#include "tensorrt_log.h"
#include "tensorrt_plugin.h"

extern "C" SIMPRUNE_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static simprune::tensorrt::PruneCreator creator;
    static simprune::tensorrt::FormerCreator former;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator, &former};
    count = 2;
    return creators;
}

extern "C" SIMPRUNE_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    simprune::tensorrt::set_logger_finder(finder);
}
