// Scores the sequences of a JSONL file with a running teacher, as `jdistill score --teacher` does: a client to start
// from.
//
// No number is believed before its reply has been checked: as it was sent and of which tokens (CRC-32), how many, in
// which order, by which model, at which temperature, and whether it can be a log-probability at all. A call that fails
// is made again as a whole, which is safe: scoring changes nothing.
#include <getopt.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "jdistill/wire/v1/teacher.grpc.pb.h"
#include "status_details.pb.h"

namespace wire = jdistill::wire::v1;
using Clock = std::chrono::system_clock;
using nlohmann::json;

const char* const HELP = R"(Score token sequences from a JSONL file with a running jdistill teacher.

  score --teacher 127.0.0.1:50051 --input in.jsonl --output out.jsonl

Lines of input and output are those of `jdistill score`, whose --help describes them.

  --teacher HOST:PORT  address of the teacher
  --input FILE         JSONL file to read
  --output FILE        JSONL file to write; it appears only when all of it is there
  --temperature T      divides the logits (1)
  --model NAME         the served model or adapter (the base model)
  --deadline-s S       over all attempts of a call: how long a teacher may stay away (600)
  --tls-ca FILE        PEM: the authority that signed the teacher's certificate; with it, TLS
  --token-file FILE    its first word is sent as bearer token; read again for each attempt
  --help               this text

Exit codes: 0 all scored, 1 the teacher failed, 2 the arguments or the input are wrong.
)";

constexpr size_t GROUP_TOKENS = 16384;  // of one call: enough to keep an engine busy
constexpr int CALLS_UNDER_WAY = 4;
constexpr int MAX_MESSAGE_BYTES =
    256 << 20;  // one 8,193-token sequence with top-64 is more than gRPC's default of 4 MiB

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct VerificationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct CallError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

struct Options {
  std::string teacher, input, output, model, ca, token_file;
  float temperature = 1;
  double deadline_s = 600;
};

// --- the input ---

struct Item {
  int line = 0;
  json id;
  std::vector<uint32_t> token_ids, candidate_ids;
  std::vector<std::pair<uint32_t, uint32_t>> spans;
  uint32_t num_scored = 0, top_k = 0, width = 0;  // width: candidates of a position
};

uint32_t to_count(const json& value, const std::string& what) {
  // What the wire cannot hold is refused here: a conversion would make 2.5 into 2, and -1 into 4294967295.
  if (!value.is_number_unsigned() || value.get<uint64_t>() > UINT32_MAX)
    throw UsageError(what + ", got " + value.dump());
  return value.get<uint32_t>();
}

std::vector<uint32_t> to_counts(const json& values, const std::string& what) {
  if (!values.is_array()) throw UsageError(what);
  std::vector<uint32_t> result;
  for (const json& value : values) result.push_back(to_count(value, what));
  return result;
}

Item read_item(const std::string& content, int line, const std::string& place) {
  json data;
  try {
    data = json::parse(content);
  } catch (const json::exception& e) {
    throw UsageError(place + ": not JSON (" + e.what() + ")");
  }
  if (!data.is_object()) throw UsageError(place + ": expected a JSON object with token_ids");
  Item item;
  item.line = line;
  item.id = line;
  const json none;
  const auto take = [&](const char* key) {
    const json value = data.value(key, none);
    data.erase(key);
    return value;
  };
  item.token_ids = to_counts(take("token_ids"), place + ": token_ids: expected token ids");
  if (item.token_ids.size() < 2)
    throw UsageError(place + ": token_ids: at least 2 are needed; the first one has no score");
  if (const json id = take("id"); !id.is_null()) {
    if (!id.is_string() && !id.is_number_integer()) throw UsageError(place + ": id: expected a string or an integer");
    item.id = id;
  }
  if (const json top_k = take("top_k"); !top_k.is_null())
    item.top_k = to_count(top_k, place + ": top_k: expected a whole number");
  if (const json spans = take("spans"); !spans.is_null()) {
    const std::string what =
        place + ": spans: expected [[start, stop], ..]; leave it out to score all but the first token";
    if (!spans.is_array() || spans.empty()) throw UsageError(what);
    for (const json& span : spans) {
      const auto pair = to_counts(span, what);
      if (pair.size() != 2 || pair[0] >= pair[1]) throw UsageError(what);
      item.spans.emplace_back(pair[0], pair[1]);
    }
  } else {
    item.spans.emplace_back(1, static_cast<uint32_t>(item.token_ids.size()));
  }
  for (const auto& [start, stop] : item.spans) item.num_scored += stop - start;
  if (const json rows = take("candidate_ids"); !rows.is_null()) {
    const std::string what =
        text(place, ": candidate_ids: expected ", item.num_scored, " rows, one a scored position, of one length");
    if (!rows.is_array() || rows.size() != item.num_scored) throw UsageError(what);
    item.width = rows[0].size();
    for (const json& row : rows) {
      const auto ids = to_counts(row, what);
      if (ids.empty() || ids.size() != item.width) throw UsageError(what);
      item.candidate_ids.insert(item.candidate_ids.end(), ids.begin(), ids.end());
    }
  }
  if (!data.empty()) throw UsageError(place + ": unknown key " + data.begin().key());
  return item;
}

std::vector<Item> read_items(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw UsageError("--input " + path + ": there is no such file");
  std::vector<Item> items;
  std::string content;
  for (int line = 1; std::getline(file, content); ++line) {
    if (content.find_first_not_of(" \t\r") != std::string::npos)
      items.push_back(read_item(content, line, text(path, ":", line)));
  }
  if (items.empty()) throw UsageError("--input " + path + " is empty: expected a JSON object a line, with token_ids");
  return items;
}

// Neighbours that can share a call: of one top_k and one number of candidates. Pairs of (first, past the last).
std::vector<std::pair<size_t, size_t>> to_groups(const std::vector<Item>& items) {
  std::vector<std::pair<size_t, size_t>> groups;
  size_t tokens = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    tokens += items[i].token_ids.size();
    const bool same = i > 0 && items[i].top_k == items[i - 1].top_k && items[i].width == items[i - 1].width;
    if (same && tokens <= GROUP_TOKENS) {
      groups.back().second = i + 1;
    } else {
      groups.emplace_back(i, i + 1);
      tokens = items[i].token_ids.size();
    }
  }
  return groups;
}

// --- one reply ---

struct Scores {
  std::vector<float> logprobs, top_logprobs, candidate_logprobs;
  std::vector<uint32_t> top_ids;
};

// zlib's CRC-32 of bytes, continued. Numbers count as they are on the wire, little-endian, whatever this machine is.
class Crc {
 public:
  void add(uint32_t value) {
    const Bytef bytes[] = {Bytef(value), Bytef(value >> 8), Bytef(value >> 16), Bytef(value >> 24)};
    value_ = crc32_z(value_, bytes, sizeof bytes);
  }
  void add(float value) {
    uint32_t bits;
    static_assert(sizeof bits == sizeof value);
    std::memcpy(&bits, &value, sizeof bits);
    add(bits);
  }
  // A field of a message, as payload_crc wants it: its size, then its bytes.
  void field(const std::string& value) {
    add(static_cast<uint32_t>(value.size()));
    value_ = crc32_z(value_, reinterpret_cast<const Bytef*>(value.data()), value.size());
  }
  void field(uint32_t value) { add(4u), add(value); }
  void field(float value) { add(4u), add(value); }
  template <class T>
  void field(const google::protobuf::RepeatedField<T>& values) {
    add(static_cast<uint32_t>(4 * values.size()));
    for (const T value : values) add(value);
  }
  uint32_t value() const { return value_; }

 private:
  uint32_t value_ = 0;
};

uint32_t token_crc(const std::vector<uint32_t>& ids) {
  Crc crc;
  for (const uint32_t id : ids) crc.add(id);
  return crc.value();
}

// "Checksums" in teacher.proto: all fields in the order of their numbers. temperature must have been set.
uint32_t payload_crc(const wire::ScoreSequencesRequest& m) {
  Crc crc;
  const auto add = [&](const auto&... fields) { (crc.field(fields), ...); };
  add(m.model(), m.expected_fingerprint(), m.temperature(), m.top_k(), m.request_id(), m.max_chunk_bytes(),
      m.sequence_lengths(), m.token_ids(), m.span_counts(), m.span_starts(), m.span_ends(), m.candidate_count(),
      m.candidate_ids(), m.prefix_lengths(), m.prefix_replaced(), m.prefix_token_ids());
  return crc.value();
}

uint32_t payload_crc(const wire::ScoreSequencesResponse& m) {
  Crc crc;
  const auto add = [&](const auto&... fields) { (crc.field(fields), ...); };
  add(m.sequence_indexes(), m.first_targets(), m.target_counts(), m.token_crcs(), m.logprobs(), m.top_ids(),
      m.top_logprobs(), m.candidate_logprobs(), m.model(), m.fingerprint(), m.tokenizer_fingerprint(), m.temperature());
  return crc.value();
}

void check(bool good, const std::string& what) {
  if (!good) throw VerificationError(what);
}

// Puts the chunks of one call together.
class Reply {
 public:
  Reply(const Item* items, size_t count, const wire::ModelInfo& model, float temperature)
      : items_(items), model_(model), temperature_(temperature), scores_(count) {
    for (size_t b = 0; b < count; ++b) crcs_.push_back(token_crc(items[b].token_ids));
  }

  void add(const wire::ScoreSequencesResponse& chunk) {
    check(
        chunk.fingerprint() == model_.fingerprint() && chunk.tokenizer_fingerprint() == model_.tokenizer_fingerprint(),
        "another model or tokenizer than at the beginning: the teacher was exchanged");
    check(chunk.temperature() == temperature_,
          text("scored at temperature ", chunk.temperature(), ", asked for ", temperature_));
    const int num_entries = chunk.sequence_indexes_size();
    check(chunk.first_targets_size() == num_entries && chunk.target_counts_size() == num_entries &&
              chunk.token_crcs_size() == num_entries,
          text(num_entries, " sequence_indexes, but not as many first_targets, target_counts and token_crcs"));
    uint64_t num_targets = 0;
    for (const uint32_t count : chunk.target_counts()) num_targets += count;
    const uint64_t top_k = items_[0].top_k, width = items_[0].width;
    const auto check_size = [&](const char* name, uint64_t size, uint64_t expected) {
      check(size == expected, text(size, " ", name, ", expected ", expected));
    };
    check_size("logprobs", chunk.logprobs_size(), num_targets);
    check_size("top_ids", chunk.top_ids_size(), num_targets * top_k);
    check_size("top_logprobs", chunk.top_logprobs_size(), num_targets * top_k);
    check_size("candidate_logprobs", chunk.candidate_logprobs_size(), num_targets * width);
    for (const auto* values : {&chunk.logprobs(), &chunk.top_logprobs(), &chunk.candidate_logprobs()}) {
      for (const float x : *values)
        check(x <= 0 && std::isfinite(x), text(x, ": a log-probability is finite and at most 0"));
    }
    for (const uint32_t id : chunk.top_ids())
      check(id < model_.vocab_size(), text("top_ids has ", id, ", outside the vocabulary"));
    for (uint64_t i = 0; i < num_targets * top_k; ++i) {
      check(i % top_k == 0 || chunk.top_logprobs(i) <= chunk.top_logprobs(i - 1),
            "top_logprobs are not in descending order");
    }
    uint64_t offset = 0;
    for (int e = 0; e < num_entries; ++e) {
      const uint32_t b = chunk.sequence_indexes(e), first = chunk.first_targets(e), count = chunk.target_counts(e);
      check(b < scores_.size(), text("scores of sequence ", b, " of ", scores_.size()));
      const Item& item = items_[b];
      Scores& scores = scores_[b];
      check(chunk.token_crcs(e) == crcs_[b], text("line ", item.line, ": other token ids were scored than were sent"));
      check(first == scores.logprobs.size() && count > 0 && count <= item.num_scored - first,
            text("line ", item.line, ": ", count, " scores from ", first, " on came after ", scores.logprobs.size(),
                 " of ", item.num_scored));
      const auto append = [&](auto& whole, const auto& values, uint64_t per_target) {
        whole.insert(whole.end(), values.begin() + offset * per_target, values.begin() + (offset + count) * per_target);
      };
      append(scores.logprobs, chunk.logprobs(), 1);
      append(scores.top_ids, chunk.top_ids(), top_k);
      append(scores.top_logprobs, chunk.top_logprobs(), top_k);
      append(scores.candidate_logprobs, chunk.candidate_logprobs(), width);
      offset += count;
    }
  }

  std::vector<Scores> finish() {
    for (size_t b = 0; b < scores_.size(); ++b) {
      check(scores_[b].logprobs.size() == items_[b].num_scored,
            text("line ", items_[b].line, ": the stream ended after ", scores_[b].logprobs.size(), " of ",
                 items_[b].num_scored, " scores"));
    }
    return std::move(scores_);
  }

 private:
  const Item* items_;
  const wire::ModelInfo& model_;
  float temperature_;
  std::vector<uint32_t> crcs_;
  std::vector<Scores> scores_;
};

// --- calls ---

struct Details {
  std::optional<double> retry_after_s;
  std::optional<int> sequence;  // which one of the call is to blame
};

// What google.rpc.Status says about a failed call; nothing parses the text of an error.
Details details_of(const grpc::Status& status) {
  Details result;
  google::rpc::Status all;
  if (!all.ParseFromString(status.error_details())) return result;  // a proxy's garbage: the code alone must do
  for (const auto& detail : all.details()) {
    google::rpc::RetryInfo retry;
    google::rpc::ErrorInfo info;
    if (detail.UnpackTo(&retry))
      result.retry_after_s = retry.retry_delay().seconds() + 1e-9 * retry.retry_delay().nanos();
    if (detail.UnpackTo(&info) && info.metadata().count("sequence"))
      result.sequence = std::stoi(info.metadata().at("sequence"));
  }
  return result;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw UsageError(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string describe(const grpc::Status& status) {
  static const char* const names[] = {
      "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
      "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
      "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
      "DATA_LOSS", "UNAUTHENTICATED"};
  const int code = status.error_code();
  return (code >= 0 && code <= 16 ? names[code] : std::to_string(code)) + std::string(": ") + status.error_message();
}

class Teacher {
 public:
  explicit Teacher(const Options& options) : options_(options) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(MAX_MESSAGE_BYTES);
    arguments.SetMaxSendMessageSize(MAX_MESSAGE_BYTES);
    // All three, or a dead peer is found after a minute only, whatever the first two say; with them within 40 s.
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20000);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
    arguments.SetInt("grpc.http2.ping_timeout_ms", 20000);
    arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // no limit: a long prefill sends no data for minutes
    arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);                // attempt() decides
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    // By default a teacher that is back waits for up to two minutes, and for 30 s until its name is looked up again.
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
    arguments.SetInt(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 1000);
    auto credentials = grpc::InsecureChannelCredentials();
    if (!options.ca.empty()) {
      grpc::SslCredentialsOptions ssl;
      ssl.pem_root_certs = read_file(options.ca);
      credentials = grpc::SslCredentials(ssl);
    }
    stub_ = wire::TeacherService::NewStub(grpc::CreateCustomChannel(options.teacher, credentials, arguments));
  }

  // What is served under --model; while the server loads, nothing is.
  wire::ModelInfo info() {
    wire::GetServerInfoResponse reply;
    attempt([&](grpc::ClientContext& context) {
      const grpc::Status status = stub_->GetServerInfo(&context, {}, &reply);
      if (status.ok() && reply.models().empty()) return grpc::Status(grpc::UNAVAILABLE, "the teacher loads its model");
      return status;
    });
    for (const auto& model : reply.models()) {
      if (options_.model.empty() || model.model() == options_.model) return model;
    }
    throw UsageError("--model " + options_.model + ": the teacher has no model of that name");
  }

  std::vector<Scores> score(const Item* items, size_t count, const wire::ModelInfo& model) {
    wire::ScoreSequencesRequest request;
    request.set_model(options_.model);
    request.set_expected_fingerprint(model.fingerprint());
    request.set_temperature(options_.temperature);
    request.set_top_k(items[0].top_k);
    request.set_request_id(text(getpid(), "-", next_request_++));
    request.set_candidate_count(items[0].width);
    for (const Item* item = items; item != items + count; ++item) {
      request.add_sequence_lengths(item->token_ids.size());
      request.mutable_token_ids()->Add(item->token_ids.begin(), item->token_ids.end());
      request.add_span_counts(item->spans.size());
      for (const auto& [start, stop] : item->spans) {
        request.add_span_starts(start);
        request.add_span_ends(stop);
      }
      request.mutable_candidate_ids()->Add(item->candidate_ids.begin(), item->candidate_ids.end());
    }
    request.set_payload_crc(payload_crc(request));
    std::vector<Scores> scores;
    attempt([&](grpc::ClientContext& context) {
      Reply reply(items, count, model, options_.temperature);
      const auto stream = stub_->ScoreSequences(&context, request);
      wire::ScoreSequencesResponse chunk;
      try {
        while (stream->Read(&chunk)) {
          if (!chunk.has_payload_crc() || chunk.payload_crc() != payload_crc(chunk)) {
            context.TryCancel();
            stream->Finish();
            return grpc::Status(grpc::UNAVAILABLE, "a reply was changed on its way (payload_crc)");
          }
          reply.add(chunk);
        }
      } catch (...) {  // a reply that is wrong: the rest of it is not wanted
        context.TryCancel();
        stream->Finish();
        throw;
      }
      grpc::Status status = stream->Finish();
      if (status.ok()) {
        scores = reply.finish();
      } else if (const auto b = details_of(status).sequence; b && *b >= 0 && static_cast<size_t>(*b) < count) {
        status = {status.error_code(), text("line ", items[*b].line, ": ", status.error_message()),
                  status.error_details()};
      }
      return status;
    });
    return scores;
  }

 private:
  // Makes call(context) until it succeeds, fails for good, or the deadline has passed.
  template <class Call>
  void attempt(Call call) {
    thread_local std::mt19937 random(std::random_device{}());
    const auto deadline =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(options_.deadline_s));
    for (double backoff_s = 0.2;; backoff_s = std::min(2 * backoff_s, 2.0)) {
      grpc::ClientContext context;  // one an attempt: it cannot be used again
      context.set_deadline(deadline);
      if (!options_.token_file.empty()) {
        std::string token;
        std::istringstream(read_file(options_.token_file)) >> token;
        context.AddMetadata("authorization", "Bearer " + token);
      }
      const grpc::Status status = call(context);
      if (status.ok()) return;
      const auto retry_after_s = details_of(status).retry_after_s;
      // RESOURCE_EXHAUSTED without RetryInfo is gRPC's own limit on a message: the next attempt would end alike.
      const bool again =
          status.error_code() == grpc::UNAVAILABLE ||
          (status.error_code() == grpc::RESOURCE_EXHAUSTED && retry_after_s) ||
          (status.error_code() == grpc::INTERNAL && status.error_message().find("RST_STREAM") != std::string::npos);
      // Jitter: clients must not come back in step.
      const double wait_s =
          std::max(retry_after_s.value_or(0), backoff_s) * std::uniform_real_distribution<>(1, 1.2)(random);
      const auto wait = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(wait_s));
      if (!again || Clock::now() + wait > deadline) throw CallError(describe(status));
      std::cerr << text(describe(status), "; again in ", wait_s, " s\n");
      std::this_thread::sleep_for(wait);
    }
  }

  const Options& options_;
  std::unique_ptr<wire::TeacherService::Stub> stub_;
  std::atomic<int> next_request_{0};
};

// --- the output ---

// JSON of num_rows * width values (numbers alone if width is 0), each the shortest decimal that reads back as itself.
// Not nlohmann's: it would print a float32 with the 17 digits of its double.
template <class T>
std::string to_json(const std::vector<T>& values, size_t width) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0)
      out += width && i % width == 0 ? "], [" : ", ";
    else if (width)
      out += "[";
    char digits[32];
    out.append(digits, std::to_chars(digits, digits + sizeof digits, values[i]).ptr);
  }
  return out + (width ? "]]" : "]");
}

std::string format_line(const Item& item, const Scores& scores) {
  std::string out = "{\"id\": " + item.id.dump() + ", \"logprobs\": " + to_json(scores.logprobs, 0);
  if (item.top_k) {
    out += ", \"top_ids\": " + to_json(scores.top_ids, item.top_k) +
           ", \"top_logprobs\": " + to_json(scores.top_logprobs, item.top_k);
  }
  if (item.width) out += ", \"candidate_logprobs\": " + to_json(scores.candidate_logprobs, item.width);
  return out + "}\n";
}

double to_number(const char* name, const std::string& value) {
  size_t end = 0;
  double number = 0;
  try {
    number = std::stod(value, &end);
  } catch (const std::exception&) {
  }
  if (end != value.size() || !(number > 0) || !std::isfinite(number))
    throw UsageError(text("--", name, " ", value, ": expected a number above 0"));
  return number;
}

std::optional<Options> read_options(int argc, char** argv) {
  Options options;
  static const option flags[] = {{"teacher", 1, nullptr, 't'},     {"input", 1, nullptr, 'i'},
                                 {"output", 1, nullptr, 'o'},      {"model", 1, nullptr, 'm'},
                                 {"tls-ca", 1, nullptr, 'c'},      {"token-file", 1, nullptr, 'f'},
                                 {"temperature", 1, nullptr, 'T'}, {"deadline-s", 1, nullptr, 'd'},
                                 {"help", 0, nullptr, 'h'},        {}};
  for (int flag; (flag = getopt_long(argc, argv, "", flags, nullptr)) != -1;) {
    switch (flag) {
      case 't':
        options.teacher = optarg;
        break;
      case 'i':
        options.input = optarg;
        break;
      case 'o':
        options.output = optarg;
        break;
      case 'm':
        options.model = optarg;
        break;
      case 'c':
        options.ca = optarg;
        break;
      case 'f':
        options.token_file = optarg;
        break;
      case 'T':
        options.temperature = static_cast<float>(to_number("temperature", optarg));
        break;
      case 'd':
        options.deadline_s = to_number("deadline-s", optarg);
        break;
      case 'h':
        return std::nullopt;
      default:
        throw UsageError("--help lists the arguments");
    }
  }
  if (optind != argc) throw UsageError(text("unexpected argument ", argv[optind]));
  if (options.teacher.empty()) throw UsageError("--teacher is missing; --help says more");
  if (options.input.empty()) throw UsageError("--input is missing; --help says more");
  if (options.output.empty()) throw UsageError("--output is missing; --help says more");
  return options;
}

void run(const Options& options) {
  const std::vector<Item> items = read_items(options.input);  // the whole input is checked before anything is scored
  const auto groups = to_groups(items);
  Teacher teacher(options);
  const wire::ModelInfo model = teacher.info();
  std::vector<std::vector<Scores>> results(groups.size());
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  const auto work = [&] {
    try {
      for (size_t g; (g = next++) < groups.size();) {
        const auto [first, last] = groups[g];
        results[g] = teacher.score(&items[first], last - first, model);
      }
    } catch (...) {
      next = groups.size();  // nobody begins another one
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < CALLS_UNDER_WAY; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);

  const std::string temporary = text(options.output, ".", getpid(), ".tmp");
  std::ofstream file(temporary, std::ios::binary);
  for (size_t g = 0; g < groups.size(); ++g) {
    for (size_t b = 0; b < results[g].size(); ++b) file << format_line(items[groups[g].first + b], results[g][b]);
  }
  file.close();
  // At once: a reader sees all of it or what was there before.
  if (!file || std::rename(temporary.c_str(), options.output.c_str()) != 0) {
    std::remove(temporary.c_str());
    throw UsageError("--output " + options.output + ": cannot be written");
  }
  std::cerr << text("scored ", items.size(), " sequences with ", model.model(), " -> ", options.output, "\n");
}

int main(int argc, char** argv) {
  try {
    const auto options = read_options(argc, argv);
    if (!options)
      std::cout << HELP;
    else
      run(*options);
    return 0;
  } catch (const UsageError& e) {
    std::cerr << "error: " << e.what() << "\n";
    return 2;
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << "\n";
    return 1;
  }
}
