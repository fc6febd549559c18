// What TensorRT looks for in a plugin library.
#include "simprune.h"
#include "tensorrt_log.h"
#include "tensorrt_plugin.h"

extern "C" SIMPRUNE_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static simprune::tensorrt::PruneCreator creator;
    // Not FormerCreator too: of two creators with one name in a library TensorRT's deregisterLibrary
    // leaves one behind, whose code is gone then (seen in 10.16, 11.0 and 11.4)
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

extern "C" SIMPRUNE_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    simprune::tensorrt::set_logger_finder(finder);
}
