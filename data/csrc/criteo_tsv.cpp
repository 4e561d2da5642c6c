// Criteo's tab-separated rows to fixed-size records. data/formats/criteo_tsv.py does the same in polars, and says what is wrong with a
// line that is refused here.
//
// A field is read 8 characters at a time in one 64-bit word, without a branch on its length: lengths are what a branch
// predictor can't guess. The first character is the word's lowest byte (little-endian machines).

#include <cstdint>
#include <cstring>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are taken from the text as they lie there");

namespace {

constexpr int kDense = 13, kSparse = 26;
constexpr int32_t kMissing = INT32_MIN;
constexpr uint64_t kHighBits = 0x8080808080808080, kOnes = 0x0101010101010101;

struct Text {
    const char* at;
    const char* end;

    uint64_t word() const {
        uint64_t w = 0;
        std::memcpy(&w, at, end - at >= 8 ? 8 : end - at);
        return w;
    }
    bool skip(char c) {
        if (at == end || *at != c) return false;
        ++at;  // after the branch, so that the next field's word doesn't wait for the comparison
        return true;
    }
};

// The high bit of each byte that is at least `low` and below `high`; of bytes that are not ASCII it says nothing.
inline uint64_t in_range(uint64_t w, int low, int high) {
    return ((w + kOnes * (0x80 - low)) & ~(w + kOnes * (0x80 - high))) & kHighBits;
}

// How many of the first characters have their high bit in `mask`, 0 to 8.
inline int leading(uint64_t mask) { return mask == kHighBits ? 8 : __builtin_ctzll(~mask & kHighBits) / 8; }

// The first n characters moved to the end of the word, zeros before them.
inline uint64_t right_align(uint64_t w, int n) { return n ? w << (8 * (8 - n)) : 0; }

// An optional minus and digits, or nothing. Leaves the text on the character after.
inline bool read_integer(Text& text, int32_t& out) {
    const uint64_t word = text.word();
    const int n = leading(in_range(word & ~kHighBits, '0', '9' + 1) & ~word);
    if (n == 8 || *text.at == '-') {
        const bool negative = text.skip('-');
        const char* const digits = text.at;
        int64_t x = 0;
        for (; text.at < text.end && *text.at >= '0' && *text.at <= '9'; ++text.at) {
            x = x * 10 + (*text.at - '0');
            if (x > INT32_MAX) return false;
        }
        out = static_cast<int32_t>(negative ? -x : x);
        return text.at != digits;
    }
    // Pairs of digits, then of pairs, then of fours.
    uint64_t x = right_align(word & (kOnes * 0x0F), n);
    x = (x * 10 + (x >> 8)) & 0x00FF00FF00FF00FF;
    x = (x * 100 + (x >> 16)) & 0x0000FFFF0000FFFF;
    x = (x * 10000 + (x >> 32)) & 0xFFFFFFFF;
    out = n ? static_cast<int32_t>(x) : kMissing;
    text.at += n;
    return true;
}

// Up to 8 hexadecimal digits. A ninth is left where the separator should be, and refused there.
inline uint32_t read_hex(Text& text) {
    const uint64_t word = text.word(), ascii = word & ~kHighBits;
    const int n = leading((in_range(ascii, '0', '9' + 1) | in_range(ascii | kOnes * 0x20, 'a', 'f' + 1)) & ~word);
    const uint64_t digits = (word & (kOnes * 0x0F)) + 9 * (word >> 6 & kOnes);
    uint64_t x = __builtin_bswap64(right_align(digits, n));
    x = (x | x >> 4) & 0x00FF00FF00FF00FF;
    x = (x | x >> 8) & 0x0000FFFF0000FFFF;
    text.at += n;
    return static_cast<uint32_t>(x | x >> 16);
}

// A row to a record: the label if there is one, 13 integers, 26 ids. False if it isn't a row.
inline bool read_row(Text& text, bool labelled, int32_t* record) {
    if (labelled) {
        *record = text.skip('1');
        if (!(*record++ || text.skip('0')) || !text.skip('\t')) return false;
    }
    for (int i = 0; i < kDense; ++i) {
        if (!read_integer(text, *record++) || !text.skip('\t')) return false;
    }
    for (int i = 0; i < kSparse; ++i) {
        const uint32_t id = read_hex(text);
        if (i + 1 < kSparse && !text.skip('\t')) return false;
        std::memcpy(record++, &id, sizeof id);
    }
    return true;
}

}  // namespace

// Reads text that ends with a line end.
//
// records: room for as many as there are lines, bad_lines likewise; they get the records, and the indices of the lines
// that are not rows, whose number goes to *bad. Returns the number of records.
extern "C" int64_t read_criteo(const char* text, int64_t size, int labelled, int32_t* records, int64_t* bad_lines,
                               int64_t* bad) {
    const int64_t width = (labelled ? 1 : 0) + kDense + kSparse;
    Text rest{text, text + size};
    int64_t rows = 0;
    *bad = 0;
    for (int64_t line = 0; rest.at < rest.end; ++line) {
        const char* const begin = rest.at;
        if (read_row(rest, labelled, records + rows * width)) {
            rest.skip('\r');
            if (rest.skip('\n')) {
                ++rows;
                continue;
            }
        }
        bad_lines[(*bad)++] = line;
        rest.at = static_cast<const char*>(std::memchr(begin, '\n', rest.end - begin)) + 1;
    }
    return rows;
}
