#include "core/scheduler.hpp"

#include <pybind11/stl.h>

#include <cmath>
#include <thread>

#include "bindings.hpp"
#include "core/executor.hpp"
#include "core/runner.hpp"
#include "core/virtual_clock.hpp"

namespace worldenv {
namespace {

using Pair = std::pair<double, double>;  // (fixed, per item) [s]
using Jobs = std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>>;

// What a Python executor is given: its own copy, so that it may keep it.
struct Items {
  std::uint32_t stage, device, shape;
  Array<std::uint32_t> slot, rollout, chunk, step;

  explicit Items(const Batch& batch)
      : stage(batch.stage),
        device(batch.device),
        shape(batch.shape),
        slot(size(batch)),
        rollout(size(batch)),
        chunk(size(batch)),
        step(size(batch)) {
    for (std::size_t i = 0; i < batch.items.size(); ++i) {
      const Item& item = batch.items[i];
      slot.mutable_data()[i] = item.slot;
      rollout.mutable_data()[i] = item.rollout;
      chunk.mutable_data()[i] = item.chunk;
      step.mutable_data()[i] = item.step;
    }
  }
  static py::ssize_t size(const Batch& batch) { return static_cast<py::ssize_t>(batch.items.size()); }
};

// The GIL is held while the callable runs, and only then; what the callable waits for without it, runs beside others.
class PythonExecutor : public Executor {
 public:
  explicit PythonExecutor(py::function call) : call_(std::move(call)) {}

  void run(const Batch& batch, std::span<Verdict> verdicts) override {
    const py::gil_scoped_acquire gil;
    try {
      const py::object said = call_(py::cast(Items(batch)));
      if (verdicts.empty()) {
        if (!said.is_none()) throw std::runtime_error("an executor that does not judge returned a value; want None");
        return;
      }
      const auto given = said.cast<std::vector<std::pair<bool, double>>>();
      if (given.size() != verdicts.size()) {
        throw std::runtime_error(std::to_string(given.size()) + " verdicts for " + std::to_string(verdicts.size()) +
                                 " rollouts");
      }
      for (std::size_t i = 0; i < given.size(); ++i) {
        if (!std::isfinite(given[i].second)) throw std::runtime_error("a verdict's value is not finite");
        verdicts[i] = {given[i].first, given[i].second};
      }
    } catch (py::error_already_set& error) {
      const std::string name = py::str(error.type().attr("__name__")), text = py::str(error.value());
      throw std::runtime_error(name + ": " + text);  // nothing of Python leaves this block with the GIL
    } catch (const py::cast_error&) {
      throw std::runtime_error("the judging executor returned something else than a list of (ended, value)");
    }
  }
  void forget() { call_ = py::function(); }  // holding the GIL; it is not run again

 private:
  py::function call_;
};

Stage make_stage(std::string name, std::vector<std::uint32_t> buckets, std::uint32_t steps,
                 std::vector<std::uint32_t> devices, const std::vector<Pair>& cost) {
  Stage stage{std::move(name), steps, std::move(buckets), std::move(devices), {}};
  for (const auto& [fixed, per_item] : cost) stage.cost.push_back({fixed, per_item});
  return stage;
}

Nanoseconds nanoseconds(double seconds, const char* name) {
  if (!(seconds >= 0.0 && seconds < 9e9))
    throw py::value_error(std::string("scheduler: ") + name + ": want seconds, 0 or more");
  return static_cast<Nanoseconds>(seconds * 1e9);
}

SchedulerConfig make_config(std::vector<Stage> stages, std::uint32_t devices, std::uint32_t slots,
                            std::uint32_t streams, const std::string& overlap, bool lock_step, double linger,
                            double max_wait, std::uint32_t attempts, std::uint32_t unread) {
  SchedulerConfig config;
  config.stages = std::move(stages);
  config.devices = devices;
  config.slots = slots;
  config.streams = streams;
  if (overlap != "off" && overlap != "auto" && overlap != "always") {
    throw py::value_error("scheduler: overlap " + overlap + ": want off, auto or always");
  }
  config.overlap = overlap == "off" ? Overlap::kOff : overlap == "auto" ? Overlap::kAuto : Overlap::kAlways;
  config.discipline = lock_step ? Discipline::kLockStep : Discipline::kContinuous;
  config.linger = nanoseconds(linger, "linger");
  config.max_wait = nanoseconds(max_wait, "max_wait");
  config.attempts = attempts;
  config.unread = unread;
  const Scheduler checked(config);
  return config;
}

std::vector<Job> make_jobs(const Jobs& jobs) {
  std::vector<Job> out;
  for (const auto& [rollout, group, chunks] : jobs) out.push_back({rollout, group, chunks});
  return out;
}

py::dict plain(const Statistics& statistics, const SchedulerConfig& config) {
  const auto seconds = [](Nanoseconds time) { return static_cast<double>(time) * 1e-9; };
  py::list stages;
  for (std::size_t s = 0; s < config.stages.size(); ++s) {
    for (const std::uint32_t d : config.stages[s].devices) {
      const StageStatistics& one = statistics.stages[s][d];
      py::dict row;
      row["stage"] = config.stages[s].name;
      row["device"] = d;
      row["batches"] = one.batches;
      row["items"] = one.items;
      row["padding"] = one.padding;
      row["speculative"] = one.speculative;
      row["wasted"] = one.wasted;
      row["failures"] = one.failures;
      row["busy_s"] = seconds(one.busy);
      row["wasted_s"] = seconds(one.wasted_time);
      row["queued_s"] = seconds(one.queued);
      stages.append(row);
    }
  }
  py::dict out;
  out["stages"] = stages;
  out["events"] = statistics.events;
  out["verdicts"] = statistics.verdicts;
  out["stops"] = statistics.stops;
  out["endings"] = statistics.endings;
  out["failed"] = statistics.failed;
  out["cancelled"] = statistics.cancelled;
  out["groups"] = statistics.groups;
  out["confirmed"] = statistics.confirmed;
  out["dropped"] = statistics.dropped;
  out["dead_chunks"] = statistics.dead_chunks;
  return out;
}

const char* word(Why why) {
  switch (why) {
    case Why::kStopped:
      return "stopped";
    case Why::kLimit:
      return "limit";
    case Why::kFailed:
      return "failed";
    case Why::kCancelled:
      break;
  }
  return "cancelled";
}

class PythonRunner {
 public:
  PythonRunner(const SchedulerConfig& config, const std::vector<py::function>& calls) : config_(config) {
    std::vector<Executor*> executors;
    for (const py::function& call : calls) {
      executors_.push_back(std::make_unique<PythonExecutor>(call));
      executors.push_back(executors_.back().get());
    }
    runner_ = std::make_unique<Runner>(config, std::move(executors));
  }
  ~PythonRunner() { stop(); }

  void stop() {
    {
      const py::gil_scoped_release nogil;  // running callables need the GIL to end
      runner_->stop();
    }
    // They hold who made them, who holds this: a circle that Python's collector cannot see through
    for (const auto& executor : executors_) executor->forget();
  }
  void submit(const Jobs& jobs) { runner_->submit(make_jobs(jobs)); }
  void cancel(std::uint32_t rollout) { runner_->cancel(rollout); }
  bool idle() const { return runner_->idle(); }
  py::dict statistics() const { return plain(runner_->statistics(), config_); }

  py::object next(double patience) {
    using Clock = std::chrono::steady_clock;
    const auto until = Clock::now() + std::chrono::nanoseconds(nanoseconds(std::min(patience, 1e9), "next"));
    while (true) {
      std::optional<Runner::Report> report;
      bool idle = false;
      {
        const py::gil_scoped_release nogil;
        const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(until - Clock::now());
        report = runner_->next(std::min<std::chrono::nanoseconds>(left, std::chrono::milliseconds(50)));
        idle = !report && (runner_->idle() || runner_->stopped());
      }
      if (report) return std::visit([](auto& one) { return py::cast(std::move(one)); }, *report);
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // control-C
      if (idle || Clock::now() >= until) return py::none();
    }
  }

 private:
  SchedulerConfig config_;
  std::vector<std::unique_ptr<PythonExecutor>> executors_;
  std::unique_ptr<Runner> runner_;
};

py::dict forecast(const SchedulerConfig& config, const std::vector<std::vector<Pair>>& cost,
                  std::vector<std::uint32_t> lengths, std::uint32_t chunk, std::uint32_t limit, std::uint32_t group,
                  std::uint32_t warm_up, double event_time, double jitter, std::uint32_t seed) {
  Simulation simulation;
  simulation.config = config;
  for (const auto& stage : cost) {
    simulation.cost.emplace_back();
    for (const auto& [fixed, per_item] : stage) simulation.cost.back().push_back({fixed, per_item});
  }
  simulation.lengths = std::move(lengths);
  simulation.chunk = chunk;
  simulation.limit = limit;
  simulation.group = group;
  simulation.warm_up = warm_up;
  simulation.event_time = nanoseconds(event_time, "event_time");
  simulation.jitter = jitter;
  simulation.seed = seed;
  Forecast made;
  {
    const py::gil_scoped_release nogil;
    made = simulate(simulation);
  }
  py::dict out;
  out["seconds"] = made.seconds;
  out["window_s"] = made.window;
  out["work_s"] = made.work;
  out["rollouts"] = made.rollouts;
  out["all_chunks"] = made.all_chunks;
  out["all_frames"] = made.all_frames;
  out["endings"] = made.endings;
  out["ended_at_s"] = made.ended_at;
  out["statistics"] = plain(made.statistics, config);
  return out;
}

Array<std::int64_t> overhead(const SchedulerConfig& config, const Jobs& jobs, std::vector<std::uint32_t> lengths) {
  if (lengths.empty()) throw py::value_error("measure_overhead: want at least one length [chunks]");
  const std::vector<Job> made = make_jobs(jobs);
  std::vector<Nanoseconds> spent;
  {
    const py::gil_scoped_release nogil;
    NoOpExecutor executor(std::move(lengths));
    spent = measure_overhead(config, made, executor);
  }
  return Array<std::int64_t>(static_cast<py::ssize_t>(spent.size()), spent.data());
}

}  // namespace

void bind_scheduler(py::module_& m) {
  py::class_<Stage>(m, "Stage",
                    "One stage of a chunk: visits per chunk, batch shapes, where it is placed, what it costs.")
      .def(py::init(&make_stage), py::arg("name"), py::arg("buckets"), py::arg("steps") = 1,
           py::arg("devices") = std::vector<std::uint32_t>{0}, py::arg("cost") = std::vector<Pair>{})
      .def_readonly("name", &Stage::name)
      .def_readonly("buckets", &Stage::buckets)
      .def_readonly("steps", &Stage::steps)
      .def_readonly("devices", &Stage::devices);
  py::class_<SchedulerConfig>(m, "SchedulerConfig", "How rollouts are scheduled; ValueError says what cannot be.")
      .def(py::init(&make_config), py::arg("stages"), py::kw_only(), py::arg("devices") = 1, py::arg("slots") = 1,
           py::arg("streams") = 1, py::arg("overlap") = "auto", py::arg("lock_step") = false, py::arg("linger") = 0.0,
           py::arg("max_wait") = 1.0, py::arg("attempts") = 3, py::arg("unread") = 0)
      .def_readonly("stages", &SchedulerConfig::stages)
      .def_readonly("devices", &SchedulerConfig::devices)
      .def_readonly("slots", &SchedulerConfig::slots);
  py::class_<Items>(m, "Batch", "What an executor is to run: arrays (n,), n at most `shape`.")
      .def_readonly("stage", &Items::stage)
      .def_readonly("device", &Items::device)
      .def_readonly("shape", &Items::shape)
      .def_readonly("slot", &Items::slot)
      .def_readonly("rollout", &Items::rollout)
      .def_readonly("chunk", &Items::chunk)
      .def_readonly("step", &Items::step);
  py::class_<Ending>(m, "Ending", "A rollout has ended; none of its work runs any more.")
      .def_readonly("rollout", &Ending::rollout)
      .def_readonly("group", &Ending::group)
      .def_readonly("chunks", &Ending::chunks)
      .def_property_readonly("why", [](const Ending& ending) { return word(ending.why); })
      .def_readonly("value", &Ending::value)
      .def_readonly("message", &Ending::message);
  py::class_<GroupEnding>(m, "GroupEnding", "All rollouts of a group have ended.")
      .def_readonly("group", &GroupEnding::group)
      .def_readonly("rollouts", &GroupEnding::rollouts)
      .def_readonly("failed", &GroupEnding::failed)
      .def_readonly("cancelled", &GroupEnding::cancelled)
      .def_readonly("mean", &GroupEnding::mean)
      .def_readonly("low", &GroupEnding::low)
      .def_readonly("high", &GroupEnding::high);
  py::class_<PythonRunner>(m, "Runner",
                           "Rollouts on worker threads, one per device and stage, each calling its stage's executor.")
      .def(py::init<const SchedulerConfig&, const std::vector<py::function>&>(), py::arg("config"),
           py::arg("executors"))
      .def("submit", &PythonRunner::submit, py::arg("jobs"))
      .def("cancel", &PythonRunner::cancel, py::arg("rollout"))
      .def("next", &PythonRunner::next, py::arg("patience") = 1e9)
      .def("stop", &PythonRunner::stop)
      .def_property_readonly("idle", &PythonRunner::idle)
      .def("statistics", &PythonRunner::statistics)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](PythonRunner& self, const py::args&) { self.stop(); });
  m.def("simulate", forecast, py::arg("config"), py::arg("cost"), py::arg("lengths"), py::kw_only(), py::arg("chunk"),
        py::arg("limit"), py::arg("group") = 1, py::arg("warm_up") = 0, py::arg("event_time") = 0.0,
        py::arg("jitter") = 0.0, py::arg("seed") = 0,
        "The scheduler on a virtual clock; ValueError: what it does not model.");
  m.def("measure_overhead", overhead, py::arg("config"), py::arg("jobs"), py::arg("lengths"),
        "Nanoseconds (n,) int64 that each event takes the scheduler, on this thread, with executors that do nothing.");
}

}  // namespace worldenv
