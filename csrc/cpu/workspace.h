// Memory of kernels, and sizes as they pad them.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace contrastive_ext {

// Uninitialised, cache-line aligned workspace.
template <class T>
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(int64_t size)
      : data_(static_cast<T*>(
            ::operator new(static_cast<size_t>(size > 0 ? size : 1) * sizeof(T), std::align_val_t{64}))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

inline int64_t padded_to(int64_t multiple, int64_t size) { return (size + multiple - 1) / multiple * multiple; }

}  // namespace contrastive_ext
