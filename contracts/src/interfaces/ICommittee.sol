// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {IJobs} from "./IJobs.sol";
import {IResolver} from "./IResolver.sol";

/// @title A resolver made of jurors that re-execute jobs
/// @notice Jurors buy tickets: each locks `seatBond` of the committee's token. A case takes a snapshot of all tickets at the
/// end of the block in which it begins, and its seed from the randomness of a later block. A ticket has a seat when
/// hash(seed, juror, ticket number) is below a threshold that gives `seats` seats on average: nobody draws, each juror
/// looks for itself and shows its seat with its commitment. Splitting tickets over many accounts changes nothing.
///
///   begin -- SEED_DELAY blocks --> seal -- commit until commitEnds -- reveal until revealEnds --> outcome
///
/// More revealed Accepts than Rejects is Accept, fewer is Reject, as many is Draw; fewer than `quorum` reveals is silence.
/// The fee of the dispute is shared by the seats that voted with the outcome (all that revealed, in a draw).
/// A seat that committed and did not reveal forfeits its ticket: a tenth is burnt, the rest leaves.
/// The seed is PREVRANDAO of the seed's block, shown by its header. A block's hash would not do: who builds a block can try
/// millions of them for free. Tickets are those of the snapshot: buying or selling some after the seed is known is too late.
/// Warning (bias): who proposes the last k blocks before the seed's block can leave some out, at the price of each one's
/// reward, and so choose among at most 2^k seeds. Who proposes all SEED_DELAY of them knows the seed when the case begins.
/// Warning: when nobody calls `seal` while the seed block's hash can be read (8,191 blocks, 256 where there is no EIP-2935), a
/// new block is named, so who does not like the seed may hope for silence. A juror, the worker or the client must call in time.
/// Warning: a majority of tickets can be bought for one case, up to the block in which it begins, and given back afterwards:
/// losing votes cost nothing but the time until the bond may leave. So all tickets together must cost more to hold than a
/// case is worth. A seat that keeps a vote to itself loses a tenth of a ticket: set `seatBond` against what jobs are worth.
/// Warning: on a chain of one sequencer, the sequencer chooses the seed. Where PREVRANDAO is a constant there is no committee.
interface ICommittee is IResolver {
    /// @param seatBond Behind each ticket, at least ten units.
    /// @param seats Seats of a case, on average.
    /// @param quorum Reveals below which a case stays silent.
    /// @param commitWindow Seconds from `begin` in which seats commit. The wait for the seed is part of it: SEED_DELAY blocks,
    /// which on a slow chain are longer than the least window. What is left must be enough to run a job again.
    /// @param revealWindow Seconds after that in which they reveal.
    /// @param leaveDelay Seconds between `resign` and `withdrawBond`: both windows and a week for `forfeit`, at least.
    struct Parameters {
        uint128 seatBond;
        uint32 seats;
        uint32 quorum;
        uint40 commitWindow;
        uint40 revealWindow;
        uint40 leaveDelay;
    }

    /// @param tickets Of this juror now.
    /// @param leaving Bond on its way out.
    /// @param freeAt Time from which `withdrawBond` may take it.
    struct Juror {
        uint32 tickets;
        uint128 leaving;
        uint40 freeAt;
    }

    /// @param snapshot Block whose tickets count; zero when the case is not known.
    /// @param seedBlock Block whose randomness is the seed.
    /// @param commits Seats that committed.
    /// @param accepts Seats that revealed Accept.
    /// @param rejects Seats that revealed Reject.
    /// @param paid Seats that took their share of the fee.
    /// @param seed Zero until `seal`.
    struct Case {
        uint48 snapshot;
        uint48 seedBlock;
        uint40 commitEnds;
        uint40 revealEnds;
        uint32 commits;
        uint32 accepts;
        uint32 rejects;
        uint32 paid;
        bytes32 seed;
        bytes32 specHash;
        bytes32 resultHash;
        bytes32 evidence;
    }

    enum SeatState {
        None,
        Committed,
        Accepted,
        Rejected,
        Forfeited,
        Paid
    }

    struct Seat {
        bytes32 commitment;
        SeatState state;
    }

    error Committee_NotAContract(address account);
    error Committee_BadParameters();
    error Committee_NoRandomness(uint256 prevrandao);
    error Committee_NotDisputes(address caller);
    error Committee_ZeroAmount();
    error Committee_Known(bytes32 jobId);
    error Committee_Unknown(bytes32 jobId);
    error Committee_TooManyTickets(uint256 held, uint256 wanted);
    error Committee_TooFewTickets(uint256 held, uint256 wanted);
    error Committee_NothingFree(address juror);
    error Committee_TooEarly(uint256 readyAt, uint256 now_);
    error Committee_TooLate(uint256 endedAt, uint256 now_);
    error Committee_Sealed(bytes32 jobId);
    error Committee_NotSealed(bytes32 jobId);
    error Committee_WrongHeader(uint48 seedBlock);
    error Committee_NoSuchTicket(address juror, uint32 ticket);
    error Committee_NoSeat(address juror, uint32 ticket);
    error Committee_Committed(address juror, uint32 ticket);
    error Committee_BadReveal(address juror, uint32 ticket);
    error Committee_BadVote(IResolver.Outcome vote);
    error Committee_NothingToForfeit(bytes32 jobId, address juror, uint32 ticket);
    error Committee_NoFee(bytes32 jobId, address juror, uint32 ticket);

    event Enrolled(address indexed juror, uint32 added, uint32 tickets, uint256 total);
    event Resigned(address indexed juror, uint32 removed, uint32 tickets, uint256 total, uint40 freeAt);
    event BondWithdrawn(address indexed juror, uint128 amount);
    event Begun(
        bytes32 indexed jobId, bytes32 specHash, bytes32 resultHash, bytes32 evidence, uint48 seedBlock, uint40 commitEnds, uint40 revealEnds
    );
    event SeedScheduled(bytes32 indexed jobId, uint48 seedBlock);
    event SeedSealed(bytes32 indexed jobId, bytes32 seed);
    event Committed(bytes32 indexed jobId, address indexed juror, uint32 ticket);
    event Revealed(bytes32 indexed jobId, address indexed juror, uint32 ticket, IResolver.Outcome vote, bytes32 resultHash);
    event Forfeited(bytes32 indexed jobId, address indexed juror, uint32 ticket, uint128 burnt);
    event FeeClaimed(bytes32 indexed jobId, address indexed juror, uint32 ticket, uint256 amount);

    /// @notice Buys tickets out of the caller's vault balance.
    function enroll(uint32 tickets) external;

    /// @notice Gives tickets back. They no longer count for new cases; their bond can be withdrawn after `leaveDelay`, which
    /// outlasts every case that they may have a seat in.
    /// Warning: a second call restarts the delay for all that is leaving.
    function resign(uint32 tickets) external;

    /// @notice After the delay: the caller's leaving bond goes to its vault balance.
    function withdrawBond() external returns (uint128 amount);

    /// @notice Before `commitEnds`: fixes the seed, or names a new block when the hash of the old one can no longer be read.
    /// Anyone may call.
    /// @param header RLP of the seed block's header; not read when a new block has to be named.
    function seal(bytes32 jobId, bytes calldata header) external;

    /// @notice Takes the seat of one of the caller's tickets.
    /// @param commitment keccak256(abi.encode(jobId, juror, ticket, vote, resultHash, salt))
    /// Warning: the salt must be random and kept secret, else anyone can find the vote by trying both.
    function commit(bytes32 jobId, uint32 ticket, bytes32 commitment) external;

    /// @notice From `commitEnds` until `revealEnds`: opens a commitment. `vote` is Accept (the challenge is right) or Reject.
    /// @param resultHash Hash of what the juror's own execution gave; for everybody to compare.
    function reveal(bytes32 jobId, uint32 ticket, Outcome vote, bytes32 resultHash, bytes32 salt) external;

    /// @notice After the reveals: burns a tenth of the bond behind a seat that committed and kept silent. Anyone may call.
    /// A juror without tickets pays it from what is leaving, as far as that goes.
    function forfeit(bytes32 jobId, address juror, uint32 ticket) external;

    /// @notice After the dispute is resolved: pays the caller's seat its share of the fee. What does not divide goes to the
    /// last ones, a unit each.
    function claimFee(IJobs.Quote calldata quote, uint32 ticket) external returns (uint256 amount);

    function hasSeat(bytes32 jobId, address juror, uint32 ticket) external view returns (bool);

    function caseOf(bytes32 jobId) external view returns (Case memory);

    function seatOf(bytes32 jobId, address juror, uint32 ticket) external view returns (Seat memory);

    function jurorOf(address juror) external view returns (Juror memory);

    /// @notice Tickets of `juror` (of all, for the zero address) at the end of a past block.
    function ticketsAt(address juror, uint48 blockNumber) external view returns (uint256);

    function parameters() external view returns (Parameters memory);
}
