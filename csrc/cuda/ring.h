// Where a producer or a consumer stands in the ring of tile buffers.
//
// Every stage has two barriers, `full` and `empty`. A barrier counts arrivals; when the last one comes its phase ends
// and the next begins. A wait names the parity of the phase whose end it waits for: 0 for the first phase, then 1, 0,
// ..
//
//   consumer, round r:  wait(full[stage], r & 1), read, arrive(empty[stage])
//   producer, round r:  wait(empty[stage], (r & 1) ^ 1), fill, whose completion ends the phase of full[stage]
//
// In round 0 the producer waits for parity 1, which a fresh barrier answers at once: its previous phase counts as over.
// Nobody can be a whole round ahead: ending phase r of `full` takes the end of phase r - 1 of `empty`, which takes
// every consumer of round r - 1. One bit of parity is therefore enough.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace contrastive_ext {
namespace hopper {

template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t round = 0;

  CE_HOST_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0, ++round;
  }
  CE_HOST_DEVICE uint32_t full_parity() const { return round & 1; }
  CE_HOST_DEVICE uint32_t empty_parity() const { return (round & 1) ^ 1; }
};

// Two consumers take turns to issue their products, consumer 0 first. Each hands the turn over once per tile, consumer
// 1 also before its first tile and not after its last: as many turns are given as are taken, none is left over at the
// end.
constexpr CE_HOST_DEVICE bool gives_first_turn(int consumer) { return consumer == 1; }
constexpr CE_HOST_DEVICE bool gives_turn(int consumer, bool is_last_tile) { return consumer == 0 || !is_last_tile; }

}  // namespace hopper
}  // namespace contrastive_ext
