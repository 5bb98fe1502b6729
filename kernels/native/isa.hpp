// Which instruction set runs: the best the processor has, or the one a test asks for.
#pragma once

#include <string>
#include <vector>

namespace nibble {

struct LinearOps;
struct Int8Ops;
struct DenseOps;
struct AttentionOps;
struct QuantizedOps;
struct RowOps;
struct ProbeOps;

// Every kernel of one instruction set.
struct Isa {
  const char* name;
  const LinearOps* linear;
  const Int8Ops* int8;
  const DenseOps* dense;
  const AttentionOps* attention;
  const QuantizedOps* quantized;
  const RowOps* rows;
  const ProbeOps* probe;
};

const Isa& active_isa();
std::vector<std::string> supported_isas();  // of this machine, best first

// Throws std::invalid_argument, naming those that exist, for one this machine or this build does not have.
void use_isa(const std::string& name);

}  // namespace nibble
