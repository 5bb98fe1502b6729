"""What is counted of compiled attention kernels."""

from benchmarks.gpu_attention import Cost, inner_loops
from benchmarks.gpu_instructions import BYTES_PER_SECOND


def test_loops_inside_others_are_counted_by_themselves() -> None:
    """Bug: the loop over splits, which holds both of the others, or one that only waits, taken for that over tokens."""
    assembly = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R2] ;
        /*0020*/                   HGMMA.64x16x16.F32 R4, R4, R8, R4 ;
        /*0030*/              @!P1 BRA 0x20 ;
        /*0040*/                   FADD R4, R4, R4 ;
        /*0050*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0060*/               @P0 BRA 0x40 ;
        /*0070*/               @P0 BRA 0x10 ;
        /*0080*/               @P2 BRA 0x80 ;
        /*0090*/                   FADD R4, R4, R4 ;
        /*00a0*/               @P2 BRA 0x90 ;
        /*00b0*/                   EXIT ;
    """
    assert inner_loops(assembly) == [2, 3]


def test_a_loop_that_memory_holds_up_takes_as_long_as_its_bytes() -> None:
    plain, packed = Cost("f16", 512, 10.0, 10.0, 128), Cost("k2v2", 72, 60.0, 40.0, 200)
    assert plain.share > 1
    assert plain.seconds == 512 / BYTES_PER_SECOND
    assert packed.share < 1
    assert packed.seconds == 72 / BYTES_PER_SECOND / packed.share
