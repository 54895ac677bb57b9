"""The layering check on small trees: a clean one passes, and each canary must be caught."""
import importlib.util
import os
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SPEC = importlib.util.spec_from_file_location("check_layering", os.path.join(ROOT, "tools", "check_layering.py"))
check_layering = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_layering)

CLEAN = {
    "base/README.md": "base\n",
    "base/status.h": "",
    "base/assert.c": '#include "base/status.h"\nvoid f(void) { abort(); }\n',
    "io/block/README.md": "block\n",
    "io/block/block.h": '#include "base/status.h"\n#include <stdio.h>\n',
    "io/block/block_internal.h": '#include "io/block/block.h"\n',
    "io/block/lanes.h": "/* Lanes. Folder-private. */\n",
    "io/block/lanes.c": '#include "io/block/lanes.h"\n',
    "io/block/block.c": '#include "io/block/block_internal.h"\n/* never exit(1) */\nint atexit(int);\n'
                        'const char *text = "abort()";\n',
    "io/block/calls.c": "int f(int fd) {\n  return backend->open(fd) + flap_system_fsync(fd);\n}\n",
    "pager/README.md": "pager\n",
    "pager/pager.c": '#include "io/block/block.h"\n#include "base/status.h"\n',
    "tools/README.md": "tools\n",
    "tools/main.c": '#include "io/block/block.h"\nint main(void) { exit(1); }\n',
    "tests/README.md": "tests\n",
    "tests/block/test_block.c": '#include "io/block/block_internal.h"\n#include "io/block/lanes.h"\n',
}

# What is added to the clean tree, and what the check must say.
CANARIES = [
    ({"io/block/up.c": '#include "pager/pager.h"\n', "pager/pager.h": ""}, "io/block must not know pager"),
    ({"base/up.c": '#  include "io/block/block.h"\n'}, "base must not know io/block"),
    ({"pager/side.c": '#include "model/model.h"\n', "model/model.h": "", "model/README.md": ""},
     "pager must not know model"),
    ({"io/block/tool.c": '#include "tools/text.h"\n', "tools/text.h": ""}, "io/block must not know tools"),
    ({"bench/b.c": '#include "tools/text.h"\n', "tools/text.h": "", "bench/README.md": ""},
     "bench must not know tools"),
    ({"pager/peek.c": '#include "io/block/block_internal.h"\n'}, "is private to io/block"),
    ({"tools/peek.c": '#include "io/block/block_internal.h"\n'}, "is private to io/block"),
    ({"tests/pager/peek.c": '#include "io/block/block_internal.h"\n'}, "is private to io/block"),
    ({"pager/peek.c": '#include "io/block/lanes.h"\n'}, "is private to io/block"),
    ({"tools/peek.c": '#include "engine/step/choice.h"\n', "engine/step/choice.h": "/* A choice.\n *\n * Folder-private. */\n",
      "engine/store/use.c": '#include "engine/step/choice.h"\n', "engine/step/README.md": "", "engine/store/README.md": "", "engine/README.md": ""},
     "is private to engine"),
    ({"pager/local.c": '#include "pager_list.h"\n', "pager/pager_list.h": ""}, "not a path from the root"),
    ({"pager/block.c": ""}, "names of files are unique"),
    ({"model/llama.c": ""}, "model: has no README.md"),
    ({"model/README.md": "x\n" * 151}, "151 lines are more than 150"),
    ({"pager/quit.c": "void f(void) {\n  exit(1);\n}\n"}, "pager/quit.c:2: exit() is not for libraries"),
    ({"pager/quit.c": "void f(void) { /* no */ abort (); }\n"}, "abort() is not for libraries"),
    ({"pager/quit.c": "void f(void) { _exit(1); }\n"}, "_exit() is not for libraries"),
    ({"io/block/round.c": "int f(int fd) {\n  return fsync(fd);\n}\n"}, "io/block/round.c:2: fsync() goes round base/system.h"),
    ({"pager/long.c": "\n" * 801}, "801 lines are more than 800"),
]


def check_tree(files):
    with tempfile.TemporaryDirectory() as root:
        for path, text in files.items():
            os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
            with open(os.path.join(root, path), "w", encoding="utf-8") as file:
                file.write(text)
        return check_layering.check(root)[0]


class Layering(unittest.TestCase):
    def test_clean_tree_passes(self):
        self.assertEqual(check_tree(CLEAN), [])

    def test_every_canary_is_caught_and_nothing_else(self):
        for more, wanted in CANARIES:
            found = check_tree({**CLEAN, **more})
            self.assertEqual(len(found), 1, f"{sorted(more)}: {found}")
            self.assertIn(wanted, found[0])


if __name__ == "__main__":
    unittest.main()
