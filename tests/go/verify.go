// Verifies a log in the static layout of C2SP tlog-tiles with golang.org/x/mod/sumdb/note and tlog,
// which Go's own checksum database is verified with.
//
//	verify DIR VERIFIER-KEY [from=MINIMUM] [OLDER-CHECKPOINT | PROOF.tlog-proof]...
//
// checks the signature and the root of DIR/checkpoint, every hash of every tile, an inclusion proof
// of every entry, and that each older checkpoint is signed and a prefix of the log, or that each
// proof shows its entry. It prints the size of the log.
//
// With a minimum index, what lies before it need not be there: hashes come from the tiles, as a client
// of such a log gets them, and each is verified up to the root.
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func main() {
	if len(os.Args) < 3 {
		fail("usage: verify DIR VERIFIER-KEY [OLDER-CHECKPOINT | PROOF.tlog-proof]...")
	}
	dir := os.Args[1]
	verifier, err := note.NewVerifier(os.Args[2])
	check(err)
	known := note.VerifierList(verifier)
	tree := open(read(filepath.Join(dir, "checkpoint")), known)
	more := os.Args[3:]
	var hashes tlog.HashReader
	var entries map[int64][]byte
	if len(more) > 0 && strings.HasPrefix(more[0], "from=") {
		minimum, err := strconv.ParseInt(strings.TrimPrefix(more[0], "from="), 10, 64)
		check(err)
		more = more[1:]
		hashes = tlog.TileHashReader(tree, tiles(dir))
		entries = loadFrom(dir, tree, minimum)
	} else {
		hashes, entries = load(dir, tree)
		checkTiles(dir, tree, hashes)
	}
	for index, entry := range entries {
		proof, err := tlog.ProveRecord(tree.N, index, hashes)
		check(err)
		check(tlog.CheckRecord(proof, tree.N, tree.Hash, index, tlog.RecordHash(entry)))
	}
	for _, path := range more {
		if strings.HasSuffix(path, ".tlog-proof") {
			checkProof(read(path), known, entries)
			continue
		}
		older := open(read(path), known)
		if older.N == 0 {
			continue
		}
		proof, err := tlog.ProveTree(tree.N, older.N, hashes)
		check(err)
		check(tlog.CheckTree(proof, tree.N, tree.Hash, older.N, older.Hash))
	}
	fmt.Println(tree.N)
}

// open verifies a checkpoint. The body is like that of Go's own trees but for the first line.
func open(data []byte, known note.Verifiers) tlog.Tree {
	opened, err := note.Open(data, known)
	check(err)
	origin, rest, _ := strings.Cut(opened.Text, "\n")
	if origin != opened.Sigs[0].Name {
		fail("the checkpoint of %q is signed by %q", origin, opened.Sigs[0].Name)
	}
	tree, err := tlog.ParseTree([]byte("go.sum database tree\n" + rest))
	check(err)
	return tree
}

// load reads all entries and makes the hashes of the tree from nothing but them.
func load(dir string, tree tlog.Tree) (tlog.HashReader, map[int64][]byte) {
	var hashes []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var found []tlog.Hash
		for _, index := range indexes {
			found = append(found, hashes[index])
		}
		return found, nil
	})
	entries := loadFrom(dir, tree, 0)
	for index := int64(0); index < tree.N; index++ {
		stored, err := tlog.StoredHashes(index, entries[index], reader)
		check(err)
		hashes = append(hashes, stored...)
	}
	root, err := tlog.TreeHash(tree.N, reader)
	check(err)
	if root != tree.Hash {
		fail("the entries have another root than the checkpoint")
	}
	return reader, entries
}

// loadFrom reads the entries of all bundles that do not end before the minimum index.
func loadFrom(dir string, tree tlog.Tree, minimum int64) map[int64][]byte {
	entries := make(map[int64][]byte)
	for number := minimum / 256; number*256 < tree.N; number++ {
		width := min(256, tree.N-number*256)
		tile := tlog.Tile{H: 8, L: 0, N: number, W: int(width)}
		path := strings.Replace(tile.Path(), "tile/8/0/", "tile/entries/", 1)
		index := number * 256
		for data := read(filepath.Join(dir, path)); len(data) > 0; index++ {
			end := 2 + int(binary.BigEndian.Uint16(data))
			entries[index] = data[2:end]
			data = data[end:]
		}
		if index != number*256+width {
			fail("%d entries in a bundle of %d", index-number*256, width)
		}
	}
	return entries
}

// tiles reads the tiles below a directory.
type tiles string

func (dir tiles) Height() int { return 8 }

func (dir tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	var found [][]byte
	for _, tile := range wanted {
		path := strings.Replace(tile.Path(), "tile/8/", "tile/", 1)
		data, err := os.ReadFile(filepath.Join(string(dir), path))
		if err != nil {
			return nil, err
		}
		found = append(found, data)
	}
	return found, nil
}

func (dir tiles) SaveTiles([]tlog.Tile, [][]byte) {}

func checkTiles(dir string, tree tlog.Tree, hashes tlog.HashReader) {
	for level := 0; tree.N>>(8*level) > 0; level++ {
		rest := tree.N >> (8 * level)
		for number := int64(0); rest > 0; number++ {
			tile := tlog.Tile{H: 8, L: level, N: number, W: int(min(256, rest))}
			rest -= int64(tile.W)
			expected, err := tlog.ReadTileData(tile, hashes)
			check(err)
			path := strings.Replace(tile.Path(), "tile/8/", "tile/", 1)
			if !bytes.Equal(read(filepath.Join(dir, path)), expected) {
				fail("%s has other hashes than the entries", path)
			}
		}
	}
}

func checkProof(data []byte, known note.Verifiers, entries map[int64][]byte) {
	head, signed, _ := bytes.Cut(data, []byte("\n\n"))
	lines := strings.Split(string(head), "\n")
	if lines[0] != "c2sp.org/tlog-proof@v1" {
		fail("not a proof: %q", lines[0])
	}
	index, err := strconv.ParseInt(strings.TrimPrefix(lines[1], "index "), 10, 64)
	check(err)
	var proof tlog.RecordProof
	for _, line := range lines[2:] {
		hash, err := base64.StdEncoding.DecodeString(line)
		check(err)
		proof = append(proof, tlog.Hash(*(*[tlog.HashSize]byte)(hash)))
	}
	tree := open(signed, known)
	check(tlog.CheckRecord(proof, tree.N, tree.Hash, index, tlog.RecordHash(entries[index])))
}

func min(a, b int64) int64 {
	if a < b {
		return a
	}
	return b
}

func read(path string) []byte {
	data, err := os.ReadFile(path)
	check(err)
	return data
}

func check(err error) {
	if err != nil {
		fail("%v", err)
	}
}

func fail(format string, arguments ...interface{}) {
	fmt.Fprintf(os.Stderr, format+"\n", arguments...)
	os.Exit(1)
}
