// The C interface.
#include "simprune.h"

#include "problem.h"

using namespace simprune;

int simprune_check(const simprune_problem* problem) {
    return check_problem(problem);
}

size_t simprune_workspace_bytes(const simprune_problem* problem) {
    return check_problem(problem) == SIMPRUNE_OK ? Layout(*problem).total : 0;
}

int simprune_enqueue(
    const simprune_problem* problem, const simprune_buffers* buffers, void* workspace, size_t workspace_bytes,
    void* stream) {
    int status = check_problem(problem);
    if (status == SIMPRUNE_OK) status = check_buffers(*problem, buffers, workspace, workspace_bytes);
    if (status != SIMPRUNE_OK) return status;
    return launch(*problem, *buffers, workspace, stream);
}
