// Fuzz target of the reader of logs (data/csrc/criteo_tsv.cpp): whatever the text, the reader touches no memory outside its
// arguments, and takes the lines that the grammar below takes, with their values.
//
// The first byte of an input says whether rows have a label. `make fuzz` builds it, with libFuzzer if there is clang, and
// else with the driver at the end of this file, which changes good lines at random.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../data/csrc/criteo_tsv.cpp"

namespace {

using Row = std::vector<uint32_t>;

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts(1);
    for (const char c : text) {
        if (c == separator) {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    return parts;
}

bool only(const std::string& text, const char* characters) {
    return text.find_first_not_of(characters) == std::string::npos;  // NUL is not among them
}

// An integer of 32 bits without the smallest one, which stands for a missing value: -?[0-9]+, or nothing.
bool integer(const std::string& text, Row& row) {
    if (text.empty()) {
        row.push_back(0x80000000u);
        return true;
    }
    const bool negative = text[0] == '-';
    std::string digits = text.substr(negative);
    if (digits.empty() || !only(digits, "0123456789")) return false;
    digits.erase(0, digits.find_first_not_of('0'));
    if (digits.size() > 10) return false;
    const long long value = digits.empty() ? 0 : std::stoll(digits);
    if (value > 2147483647) return false;
    row.push_back(static_cast<uint32_t>(negative ? -value : value));
    return true;
}

// [0-9a-fA-F]{0,8}
bool category(const std::string& text, Row& row) {
    if (text.size() > 8 || !only(text, "0123456789abcdefABCDEF")) return false;
    row.push_back(text.empty() ? 0 : static_cast<uint32_t>(std::stoul(text, nullptr, 16)));
    return true;
}

bool is_row(std::string line, bool labelled, Row& row) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    const auto fields = split(line, '\t');
    if (fields.size() != 39u + labelled) return false;
    if (labelled) {
        if (fields[0] != "0" && fields[0] != "1") return false;
        row.push_back(fields[0] == "1");
    }
    for (size_t i = 0; i < 39; ++i) {
        if (!(i < 13 ? integer(fields[i + labelled], row) : category(fields[i + labelled], row))) return false;
    }
    return true;
}

[[noreturn]] void disagree(const char* what, const std::string& text) {
    std::fprintf(stderr, "the reader and the grammar disagree on the %s of:\n", what);
    std::fwrite(text.data(), 1, text.size(), stderr);
    std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const bool labelled = data[0] & 1;
    std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
    if (text.empty() || text.back() != '\n') text += '\n';  // as the reader demands

    std::vector<std::string> lines = split(text, '\n');
    lines.pop_back();
    std::vector<uint32_t> rows;
    std::vector<int64_t> bad;
    for (size_t i = 0; i < lines.size(); ++i) {
        Row row;
        if (is_row(lines[i], labelled, row)) {
            rows.insert(rows.end(), row.begin(), row.end());
        } else {
            bad.push_back(static_cast<int64_t>(i));
        }
    }

    // Exactly as much memory as the reader may touch, each in a block of its own.
    const std::vector<char> copy(text.begin(), text.end());
    std::vector<int32_t> records(lines.size() * (39 + labelled));
    std::vector<int64_t> bad_lines(lines.size());
    int64_t bad_count = -1;
    const int64_t count = read_criteo(copy.data(), static_cast<int64_t>(copy.size()), labelled, records.data(),
                                      bad_lines.data(), &bad_count);
    if (static_cast<size_t>(count) * (39 + labelled) != rows.size()) disagree("rows", text);
    if (static_cast<size_t>(bad_count) != bad.size()) disagree("number of bad lines", text);
    if (!bad.empty() && std::memcmp(bad.data(), bad_lines.data(), bad.size() * sizeof(int64_t)))
        disagree("bad lines", text);
    if (!rows.empty() && std::memcmp(rows.data(), records.data(), rows.size() * sizeof(uint32_t)))
        disagree("values", text);
    return 0;
}

#ifdef DRIVER

#include <random>

namespace {

std::mt19937_64 generator;

size_t below(size_t n) { return generator() % n; }

std::string row(bool labelled) {
    std::string line;
    char digits[16];
    if (labelled) line += below(2) ? "1\t" : "0\t";
    for (int i = 0; i < 39; ++i) {
        const auto bits = static_cast<uint32_t>(generator() >> below(32));
        std::snprintf(digits, sizeof digits, i < 13 ? "%d" : "%08x", bits);
        if (below(4)) line += digits;
        if (i < 38) line += '\t';
    }
    return line;
}

// What readers of text are apt to take in ways of their own.
const std::vector<std::string> kPieces = {
    "\t", "\n", "\r", "\r\n", "-", "-0", "+5", " ", "_", "\"", std::string(1, '\0'), "\xef\xbb\xbf", "\x1f\x8b", "x\x9c",
    "(\xb5/\xfd", "0x", "1e5", "1.0", "nan", "\xd9\xa3", "2147483647", "2147483648", "-2147483648", "9999999999",
    "18446744073709551617", "00000000", "ffffffff", "FFFFFFFFF", std::string(5000, '0'), std::string(30, '9'), "\x80", "\xff"};

std::string input() {
    const bool labelled = below(2);
    std::string text(1, labelled);
    for (size_t lines = 1 + below(3); lines; --lines) text += row(labelled) + (below(8) ? "\n" : "\r\n");
    for (size_t edits = below(5); edits; --edits) {
        const size_t at = 1 + below(text.size() - 1);
        switch (below(4)) {
            case 0: text[at] = static_cast<char>(generator()); break;
            case 1: text.erase(at, 1 + below(9)); break;
            case 2: text.insert(at, kPieces[below(kPieces.size())]); break;
            default: {
                const size_t tab = text.find('\t', at);  // a whole field, or what begins one
                if (tab != std::string::npos) text.insert(tab + 1, kPieces[below(kPieces.size())]);
            }
        }
        if (text.size() < 2) return text;
    }
    return text;
}

}  // namespace

int main(int argc, char** argv) {
    const long inputs = argc > 1 ? std::atol(argv[1]) : 1000000;
    generator.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
    for (long i = 0; i < inputs; ++i) {
        const std::string text = input();
        LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(text.data()), text.size());
    }
    std::printf("%ld inputs: the reader and the grammar agree\n", inputs);
}

#endif
