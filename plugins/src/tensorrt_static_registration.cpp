// Registers the creators when the program starts, for applications that link the static library.
// Nothing refers to this file, so the linker takes it out of the archive only when told to take all
// of it (-Wl,--whole-archive).
#include "tensorrt_log.h"
#include "tensorrt_plugin.h"

namespace simprune {
namespace tensorrt {
namespace {

struct LogsToTensorRT {
    LogsToTensorRT() { set_logger_source(&getLogger); }
};

LogsToTensorRT logs_to_tensorrt;
REGISTER_TENSORRT_PLUGIN(PruneCreator);
REGISTER_TENSORRT_PLUGIN(FormerCreator);

}  // namespace
}  // namespace tensorrt
}  // namespace simprune
