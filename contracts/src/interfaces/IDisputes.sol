// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {IChannels} from "./IChannels.sol";
import {IJobs} from "./IJobs.sol";
import {IResolver} from "./IResolver.sol";

/// @title Faults that code decides, and challenges that a resolver decides
/// @notice Objective: two different receipts of one hot key under one channel and sequence convict the key for ever, and
/// slash once in each token. (A missed deadline is decided in IJobs.refund.) Subjective: within the window of a job its client may challenge the
/// result with a bond; the quote's resolver says Accept, Reject or Draw; silence until `resolveBy` is a draw.
///
///   outcome   worker gets     client gets back      bond                                   penalty
///   Accept    nothing         everything            half to the resolver, half back        slashed
///   Reject    what it claimed the rest              half to the resolver, half to worker   let go
///   Draw      half of it      the rest              half to the resolver, half back        let go
///   silence   half of it      the rest              all back                               let go
///
/// Halves are rounded down for the worker and for the resolver.
interface IDisputes {
    /// @dev EIP-712 struct of IChannels' domain: what a worker signs at the end of a part of a job.
    struct Receipt {
        bytes32 jobId;
        uint32 part;
        bytes32 channelId;
        uint64 sequence;
        bytes32 modelId;
        bytes32 requestHash;
        bytes32 paramsHash;
        bytes32 outputDigest;
        uint32 inputTokens;
        uint32 outputTokens;
        uint128 cost;
        bytes32 commitment;
        uint64 started;
        uint64 finished;
        uint8 finishReason;
    }

    /// @param bond Locked by the client; zero again when it was paid out.
    /// @param resolveBy From here on silence is a draw.
    /// @param fee What the resolver was paid, for it to share out.
    /// @param ended True once resolved; with `outcome` None when the resolver was silent.
    struct Dispute {
        uint128 bond;
        uint40 resolveBy;
        bool ended;
        IResolver.Outcome outcome;
        uint128 fee;
    }

    error Disputes_NotAContract(address account);
    error Disputes_NotClient(bytes32 jobId, address caller);
    error Disputes_NoResolver(bytes32 jobId);
    error Disputes_NoDispute(bytes32 jobId);
    error Disputes_Ended(bytes32 jobId);
    error Disputes_Undecided(bytes32 jobId, uint40 resolveBy);
    error Disputes_NotEnoughGas(uint256 left, uint256 needed);
    error Disputes_NoEquivocation();
    error Disputes_BadSignature(address signer);
    error Disputes_ConvictedBefore(address hotKey);

    event Equivocated(
        address indexed hotKey, bytes32 indexed channelId, uint64 sequence, bytes32 first, bytes32 second, uint256 slashId
    );
    event DisputeOpened(
        bytes32 indexed jobId, address indexed resolver, uint128 bond, uint40 resolveBy, bytes32 evidence, bool resolverTook
    );
    event DisputeResolved(
        bytes32 indexed jobId, IResolver.Outcome outcome, uint128 toWorker, uint128 bondBack, uint128 fee
    );

    /// @notice Convicts the receiver of `config`: both receipts are of that channel, have one sequence, differ, and are signed
    /// by the receiver's own key. Its key is retired for ever and the owner's stake in the channel's token is slashed by the
    /// cap, half of it for the payer. Once per key and token: a proof in a token without stake shelters no other. Anyone may
    /// report.
    /// Warning: whoever steals a key can so cost its owner half of the stake in every token. Nothing is slashed when the key
    /// was retired longer ago than UNBONDING.
    /// Warning: a proof can be copied from the pool; whoever is first is the reporter, the worker's owner too.
    /// Warning: receipts signed by a `receiverAuthorizer` that is not the receiver prove nothing: the payer chose that key.
    function proveEquivocation(
        IChannels.ChannelConfig calldata config,
        Receipt calldata first,
        bytes calldata firstSignature,
        Receipt calldata second,
        bytes calldata secondSignature
    ) external returns (uint256 slashId);

    /// @notice Client only, within the window of a submitted job: locks the bond, stops the window, calls the resolver.
    /// @param evidence Content hash of what the client has to say; only for the resolver.
    /// Warning: the caller must send enough gas for the resolver to be called with all that it may use, or it reverts.
    /// Warning: keep `bondFor` free in the vault from the opening of the job on. A pause or a delisting stops new deposits but
    /// not the window, and whoever holds an unsubmitted allocation or order of the client can lock what is free.
    function open(IJobs.Quote calldata quote, bytes32 evidence) external;

    /// @notice Ends the dispute by the resolver's outcome, or as a draw from `resolveBy` on. Anyone may call.
    function resolve(IJobs.Quote calldata quote) external;

    function disputeOf(bytes32 jobId) external view returns (Dispute memory);

    /// @notice What the client must have free in the vault to challenge `quote`, in the job's token.
    function bondFor(IJobs.Quote calldata quote) external view returns (uint128);

    /// @notice The digest under the domain of Channels that the worker signed.
    function receiptDigest(Receipt calldata receipt) external view returns (bytes32);
}
