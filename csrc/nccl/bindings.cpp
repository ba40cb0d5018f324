// Python face of nccl/.  The interpreter lock is released in every call that may wait.
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "../errors.h"
#include "../python.h"
#include "communicator.h"
#include "dlpack.h"

namespace bmt {
namespace {

using nccl::Arena;
using nccl::Communicator;
using nccl::CtaPolicy;

// Deletes the arena without the interpreter lock.  Its last owner may be a tensor that Python drops, holding the lock,
// or a thread that Python does not know.
void free_unlocked(Arena* arena) {
    std::optional<py::gil_scoped_release> unlocked;
    if (Py_IsInitialized() && PyGILState_Check()) unlocked.emplace();  // not while the interpreter is going down
    delete arena;
}

// What a DLPack consumer holds: one more owner of the arena.
struct Export {
    dlpack::ManagedTensor managed;
    int64_t shape[1];
    std::shared_ptr<Arena> arena;
};

void delete_export(dlpack::ManagedTensor* managed) { delete static_cast<Export*>(managed->manager); }

void delete_unconsumed(PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, dlpack::kCapsuleName)) return;  // a consumer took over
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
    managed->deleter(managed);
}

// A DLPack capsule of the arena's bytes (one-dimensional, uint8).
py::capsule to_dlpack(const std::shared_ptr<Arena>& arena) {
    auto* exported = new Export{{}, {static_cast<int64_t>(arena->bytes())}, arena};
    exported->managed.tensor = {arena->data(), {dlpack::kCuda, arena->device()}, 1, {dlpack::kUInt, 8, 1},
                                exported->shape, nullptr, 0};
    exported->managed.manager = exported;
    exported->managed.deleter = &delete_export;
    return py::reinterpret_steal<py::capsule>(
        PyCapsule_New(&exported->managed, dlpack::kCapsuleName, &delete_unconsumed));
}

std::unique_ptr<Communicator> make_communicator(const std::string& id, int rank, int world_size, int policy) {
    nccl::UniqueId unique;
    if (id.size() != sizeof(unique.bytes)) throw CommunicationError("A NCCL unique id has 128 bytes.");
    std::memcpy(unique.bytes, id.data(), sizeof(unique.bytes));
    py::gil_scoped_release unlocked;
    return std::make_unique<Communicator>(unique, rank, world_size, static_cast<CtaPolicy>(policy));
}

void bind_communicator(py::module_& module) {
    py::class_<Communicator>(module, "Communicator")
        .def(py::init(&make_communicator), py::kw_only(), py::arg("id"), py::arg("rank"), py::arg("world_size"),
             py::arg("policy"))
        .def_property_readonly("rank", &Communicator::rank)
        .def_property_readonly("world_size", &Communicator::world_size)
        .def_property_readonly("is_open", &Communicator::is_open)
        .def("all_gather", [](Communicator& c, Address shard, Address whole, size_t count, int dtype, Address stream) {
            c.all_gather(pointer(shard), pointer(whole), count, dtype, pointer(stream));
        }, py::kw_only(), py::arg("shard"), py::arg("whole"), py::arg("count"), py::arg("dtype"), py::arg("stream"),
           Unlocked())
        .def("reduce_scatter", [](Communicator& c, Address whole, Address shard, size_t count, int dtype, int op,
                                  Address stream) {
            c.reduce_scatter(pointer(whole), pointer(shard), count, dtype, op, pointer(stream));
        }, py::kw_only(), py::arg("whole"), py::arg("shard"), py::arg("count"), py::arg("dtype"), py::arg("op"),
           py::arg("stream"), Unlocked())
        .def("all_reduce", [](Communicator& c, Address source, Address target, size_t count, int dtype, int op,
                              Address stream) {
            c.all_reduce(pointer(source), pointer(target), count, dtype, op, pointer(stream));
        }, py::kw_only(), py::arg("source"), py::arg("target"), py::arg("count"), py::arg("dtype"), py::arg("op"),
           py::arg("stream"), Unlocked())
        .def("broadcast", [](Communicator& c, Address source, Address target, size_t count, int dtype, int root,
                             Address stream) {
            c.broadcast(pointer(source), pointer(target), count, dtype, root, pointer(stream));
        }, py::kw_only(), py::arg("source"), py::arg("target"), py::arg("count"), py::arg("dtype"), py::arg("root"),
           py::arg("stream"), Unlocked())
        .def("reduce", [](Communicator& c, Address source, Address target, size_t count, int dtype, int op, int root,
                          Address stream) {
            c.reduce(pointer(source), pointer(target), count, dtype, op, root, pointer(stream));
        }, py::kw_only(), py::arg("source"), py::arg("target"), py::arg("count"), py::arg("dtype"), py::arg("op"),
           py::arg("root"), py::arg("stream"), Unlocked())
        .def("send", [](Communicator& c, Address data, size_t count, int dtype, int peer, Address stream) {
            c.send(pointer(data), count, dtype, peer, pointer(stream));
        }, py::kw_only(), py::arg("data"), py::arg("count"), py::arg("dtype"), py::arg("peer"), py::arg("stream"),
           Unlocked())
        .def("recv", [](Communicator& c, Address data, size_t count, int dtype, int peer, Address stream) {
            c.recv(pointer(data), count, dtype, peer, pointer(stream));
        }, py::kw_only(), py::arg("data"), py::arg("count"), py::arg("dtype"), py::arg("peer"), py::arg("stream"),
           Unlocked())
        .def("register_window", [](Communicator& c, Address address) {
            return c.register_window(pointer(address));
        }, py::arg("address"), Unlocked())
        .def("deregister_window", [](Communicator& c, Address address) {
            return c.deregister_window(pointer(address));
        }, py::arg("address"), Unlocked())
        .def("split", [](Communicator& c, int color, int key, int policy) {
            return c.split(color, key, static_cast<CtaPolicy>(policy));
        }, py::kw_only(), py::arg("color"), py::arg("key"), py::arg("policy"), Unlocked())
        .def("check_async_error", &Communicator::check_async_error, Unlocked())
        .def("close", &Communicator::close, Unlocked())
        .def("abort", &Communicator::abort, Unlocked());
}

}  // namespace

void bind_nccl(py::module_& module) {
    module.def("load", [](const std::vector<std::string>& candidates) { return nccl::load(candidates).version; },
               "Load NCCL and return its version, e.g. 22809.", py::arg("candidates"), Unlocked());
    module.def("path", [] { return nccl::library().path; });
    module.def("has_arenas", [] { return nccl::library().MemAlloc != nullptr; });
    module.def("has_windows", [] { return nccl::library().CommWindowRegister != nullptr; });
    module.def("has_policies", [] { return nccl::library().version >= nccl::kVersionConfig; });
    module.def("has_float8", [] { return nccl::library().version >= nccl::kVersionFloat8; });
    module.def("unique_id", [] {
        nccl::UniqueId id = nccl::make_unique_id();
        return py::bytes(id.bytes, sizeof(id.bytes));
    });
    module.def("arena_bytes", &Arena::total_bytes, Unlocked());
    module.def("group_start", &nccl::group_start, Unlocked());
    module.def("group_end", &nccl::group_end, Unlocked());
    py::class_<Arena, std::shared_ptr<Arena>>(module, "Arena")
        .def(py::init([](size_t bytes, int device) { return Arena::make(bytes, device, &free_unlocked); }),
             py::kw_only(), py::arg("bytes"), py::arg("device"), Unlocked())
        .def_property_readonly("address", [](const Arena& a) { return reinterpret_cast<Address>(a.data()); })
        .def_property_readonly("bytes", &Arena::bytes)
        .def("to_dlpack", &to_dlpack);
    bind_communicator(module);
}

}  // namespace bmt
