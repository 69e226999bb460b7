// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {IResolver} from "./IResolver.sol";

/// @title A resolver made of jurors that re-execute jobs
/// @notice Jurors buy tickets: each locks `seatBond` of the committee's token. A case takes a snapshot of all tickets in the
/// block in which it begins, and its seed from the hash of a later block. A ticket has a seat when
/// hash(seed, job, juror, ticket number) is below a threshold that gives `seats` seats on average: nobody draws, each juror
/// looks for itself and shows its seat with its commitment. Splitting tickets over many accounts changes nothing.
///
///   begin -- SEED_DELAY blocks --> seal -- commit until commitEnds -- reveal until revealEnds --> outcome
///
/// More revealed Accepts than Rejects is Accept, fewer is Reject, as many is Draw; fewer than `quorum` reveals is silence.
/// The fee of the dispute is shared by the seats that voted with the outcome (all that revealed, in a draw).
/// A seat that committed and did not reveal forfeits its ticket: a tenth is burnt, the rest leaves.
/// Warning (bias): who proposes the seed's block can throw its hash away at the price of the block's reward, so it gets a
/// second draw; and when nobody calls `seal` within 256 blocks a new seed block is named, so somebody must. Tickets are those
/// of the snapshot: buying or selling some after the seed is known changes nothing.
interface ICommittee is IResolver {
    /// @param tickets Of this juror now.
    /// @param leaving Bond on its way out.
    /// @param freeAt Time from which `withdrawBond` may take it.
    struct Juror {
        uint32 tickets;
        uint128 leaving;
        uint40 freeAt;
    }

    /// @param snapshot Block whose tickets count.
    /// @param seedBlock Block whose hash is the seed.
    /// @param commits Seats that committed. @param accepts, rejects Seats that revealed so.
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

    error Committee_NotAContract(address account);
    error Committee_BadParameters();
    error Committee_NotDisputes(address caller);
    error Committee_ZeroAmount();
    error Committee_Known(bytes32 jobId);
    error Committee_Unknown(bytes32 jobId);
    error Committee_TooManyTickets(uint256 held, uint256 wanted);
    error Committee_NothingFree(address juror);
    error Committee_TooEarly(uint256 readyAt, uint256 now_);
    error Committee_TooLate(uint256 endedAt, uint256 now_);
    error Committee_Sealed(bytes32 jobId);
    error Committee_NotSealed(bytes32 jobId);
    error Committee_NoSuchTicket(address juror, uint32 ticket);
    error Committee_NoSeat(address juror, uint32 ticket);
    error Committee_Committed(address juror, uint32 ticket);
    error Committee_BadReveal(address juror, uint32 ticket);
    error Committee_BadVote(IResolver.Outcome vote);
    error Committee_NoFee(bytes32 jobId, address juror, uint32 ticket);

    event Enrolled(address indexed juror, uint32 added, uint32 tickets, uint256 total);
    event Left(address indexed juror, uint32 removed, uint32 tickets, uint256 total, uint40 freeAt);
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
    function leave(uint32 tickets) external;

    /// @notice After the delay: the caller's leaving bond goes to its vault balance.
    function withdrawBond() external returns (uint128 amount);

    /// @notice Keeps the hash of the seed's block, or names a new block when that hash can no longer be read. Anyone may call.
    function seal(bytes32 jobId) external;

    /// @notice Takes the seat of one of the caller's tickets.
    /// @param commitment keccak256(abi.encode(jobId, juror, ticket, vote, resultHash, salt))
    function commit(bytes32 jobId, uint32 ticket, bytes32 commitment) external;

    /// @notice Opens a commitment. `vote` is Accept (the challenge is right) or Reject.
    /// @param resultHash Hash of what the juror's own execution gave; for everybody to compare.
    function reveal(bytes32 jobId, uint32 ticket, Outcome vote, bytes32 resultHash, bytes32 salt) external;

    /// @notice After the reveals: burns a tenth of the bond behind a seat that committed and kept silent. Anyone may call.
    function forfeit(bytes32 jobId, address juror, uint32 ticket) external;

    /// @notice After the dispute is resolved: pays the caller's seat its share of the fee.
    function claimFee(bytes32 jobId, uint32 ticket) external returns (uint256 amount);

    function hasSeat(bytes32 jobId, address juror, uint32 ticket) external view returns (bool);

    function caseOf(bytes32 jobId) external view returns (Case memory);

    function jurorOf(address juror) external view returns (Juror memory);

    /// @notice Tickets of `juror` (of all, for the zero address) at the end of a past block.
    function ticketsAt(address juror, uint48 blockNumber) external view returns (uint256);
}
