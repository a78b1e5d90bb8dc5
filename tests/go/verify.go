// Verifies a log in the static layout of C2SP tlog-tiles with golang.org/x/mod/sumdb/note and tlog,
// which Go's own checksum database is verified with.
//
//	verify DIR VERIFIER-KEY [OLDER-CHECKPOINT | PROOF.tlog-proof]...
//
// checks the signature and the root of DIR/checkpoint, every hash of every tile, an inclusion proof
// of every entry, and that each older checkpoint is signed and a prefix of the log, or that each
// proof shows its entry. It prints the size of the log.
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
	hashes, entries := load(dir, tree)
	checkTiles(dir, tree, hashes)
	for index, entry := range entries {
		proof, err := tlog.ProveRecord(tree.N, int64(index), hashes)
		check(err)
		check(tlog.CheckRecord(proof, tree.N, tree.Hash, int64(index), tlog.RecordHash(entry)))
	}
	for _, path := range os.Args[3:] {
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
func load(dir string, tree tlog.Tree) (tlog.HashReader, [][]byte) {
	var hashes []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var found []tlog.Hash
		for _, index := range indexes {
			found = append(found, hashes[index])
		}
		return found, nil
	})
	var entries [][]byte
	for number := int64(0); number*256 < tree.N; number++ {
		width := min(256, tree.N-number*256)
		tile := tlog.Tile{H: 8, L: 0, N: number, W: int(width)}
		path := strings.Replace(tile.Path(), "tile/8/0/", "tile/entries/", 1)
		for data := read(filepath.Join(dir, path)); len(data) > 0; {
			end := 2 + int(binary.BigEndian.Uint16(data))
			entry := data[2:end]
			data = data[end:]
			stored, err := tlog.StoredHashes(int64(len(entries)), entry, reader)
			check(err)
			hashes = append(hashes, stored...)
			entries = append(entries, entry)
		}
	}
	if int64(len(entries)) != tree.N {
		fail("%d entries in a log of %d", len(entries), tree.N)
	}
	root, err := tlog.TreeHash(tree.N, reader)
	check(err)
	if root != tree.Hash {
		fail("the entries have another root than the checkpoint")
	}
	return reader, entries
}

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

func checkProof(data []byte, known note.Verifiers, entries [][]byte) {
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
